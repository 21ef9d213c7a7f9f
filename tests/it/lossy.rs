//! Files over a path that loses, delays, reorders, repeats and corrupts datagrams, goes dark and changes addresses, and
//! into disks that pause. They must arrive whole. Speed is not tested here.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::hostile::peer::{Peer, hello};
use crate::support::path::{Path, Settings};
use crate::support::slow::SlowStore;
use crate::support::{Host, LIMIT, content, listing, recorder, to, write};
use haul::internal::net::stream::MessageReader;
use haul::internal::protocol::{Components, End, List, Message, Refused};
use haul::{
    Client, Config, Error, Event, Identity, LocalStore, Observer, Outcome, Result, ServerTrust,
    ignore,
};
use tempfile::{TempDir, tempdir};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// The delay one way: small, since each retransmission takes a multiple of it.
const DELAY: Duration = Duration::from_millis(2);
/// A path dark for this long has made quinn back off, and is far from the idle timeout.
const OUTAGE: Duration = Duration::from_secs(3);
/// A sender that is silent for this long waits for its receiver.
const QUIET: Duration = Duration::from_secs(2);

fn settings() -> Settings {
    Settings {
        delay: DELAY,
        ..Settings::default()
    }
}

/// The configuration of a client that waits as long as it takes: the effect of loss on a handshake is a matter of luck.
fn patient() -> Config {
    Config {
        first_reply: LIMIT,
        handshake: LIMIT,
        ..Config::default()
    }
}

/// A server behind a path, with files to send to it in `source`.
struct Way {
    host: Host,
    path: Path,
    source: TempDir,
    served: TempDir,
    identity: Identity,
}

impl Way {
    async fn new(settings: Settings) -> Self {
        Self::observed(settings, ignore()).await
    }

    async fn observed(settings: Settings, observer: Observer) -> Self {
        let served = tempdir().unwrap();
        let host = Host::observed(
            Arc::new(LocalStore::open(served.path()).unwrap()),
            Config::default(),
            observer,
        );
        Self::of(host, served, settings).await
    }

    async fn of(host: Host, served: TempDir, settings: Settings) -> Self {
        let path = Path::to(host.address, 1, settings).await;
        Self {
            host,
            path,
            source: tempdir().unwrap(),
            served,
            identity: Identity::generate().unwrap(),
        }
    }

    /// Makes files of these sizes to send.
    fn files(&self, sizes: impl IntoIterator<Item = usize>) {
        for (i, size) in sizes.into_iter().enumerate() {
            write(
                &self.source.path().join(format!("t/{}/{i}", i % 3)),
                &content(i as u64, size),
            );
        }
    }

    async fn connect(&self, config: &Config) -> Result<Client> {
        let trust = ServerTrust {
            pin: Some(self.host.key_id),
            ..ServerTrust::default()
        };
        Client::connect(
            &self.identity,
            &trust,
            "127.0.0.1",
            self.path.address.port(),
            config,
        )
        .await
    }

    async fn push(&self, client: &Client, observer: Observer) -> Result<Outcome> {
        let options = to(&[&self.source.path().join("t")], "t");
        timeout(LIMIT, client.push(&options, observer))
            .await
            .expect("it ends")
    }

    /// Pushes everything over a connection of its own, and checks that it arrived unchanged.
    async fn push_whole(&self) {
        let client = self.connect(&patient()).await.unwrap();
        let (observer, events) = recorder();
        let outcome = self.push(&client, observer).await.unwrap();
        self.arrived(&client, &outcome, &events.lock().unwrap());
        client.close().await;
    }

    /// Checks that everything arrived over one connection.
    fn arrived(&self, client: &Client, outcome: &Outcome, events: &[Event]) {
        assert_eq!(outcome.sent.failed, 0, "{:?}", outcome.sent.failures);
        assert_eq!(
            listing(&self.served.path().join("t")),
            listing(&self.source.path().join("t"))
        );
        let connected = events
            .iter()
            .filter(|event| matches!(event, Event::Connected { .. }))
            .count();
        assert_eq!(connected, 1, "connections");
        assert!(
            client.connection().close_reason().is_none(),
            "it is the same one still"
        );
        assert!(
            client.connection().stats().udp_tx.bytes > outcome.sent.bytes,
            "and all went over it"
        );
    }
}

/// An observer that keeps every event, and acts once this many bytes have moved.
fn once_moved(bytes: u64, then: impl FnOnce() + Send + 'static) -> Observer {
    let state = std::sync::Mutex::new((0, Some(then)));
    Arc::new(move |event| {
        if let Event::Moved { bytes: more, .. } = event {
            let mut state = state.lock().unwrap();
            state.0 += more;
            if state.0 >= bytes
                && let Some(then) = state.1.take()
            {
                then();
            }
        }
    })
}

/// Informs both observers.
fn both(one: Observer, other: Observer) -> Observer {
    Arc::new(move |event| {
        one(event.clone());
        other(event);
    })
}

/// Waits until this many bytes have moved.
fn moved(bytes: u64) -> (Observer, oneshot::Receiver<()>) {
    let (moved, moving) = oneshot::channel();
    (once_moved(bytes, || drop(moved)), moving)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_percent_loss_each_way_still_ends() {
    let way = Way::new(Settings {
        loss: 0.3,
        ..settings()
    })
    .await;
    way.files([0, 10, 5_000, 150_000]);
    way.push_whole().await;
    assert!(
        way.path.up.counts().dropped > 50,
        "{:?}",
        way.path.up.counts()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bursts_of_losses_still_end() {
    let way = Way::new(Settings {
        burst: 0.01,
        ..settings()
    })
    .await;
    way.files([10, 50_000, 1 << 20]);
    way.push_whole().await;
    assert!(
        way.path.up.counts().dropped >= 8,
        "{:?}",
        way.path.up.counts()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn corrupted_datagrams_change_no_byte() {
    let way = Way::new(Settings {
        corrupt: 0.01,
        loss: 0.01,
        ..settings()
    })
    .await;
    way.files([10, 50_000, 4 << 20]);
    way.push_whole().await;
    assert!(
        way.path.up.counts().corrupted > 10,
        "{:?}",
        way.path.up.counts()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reordered_and_repeated_datagrams_change_no_byte() {
    let jitter = Duration::from_millis(10);
    let way = Way::new(Settings {
        jitter,
        duplicate: 0.2,
        ..settings()
    })
    .await;
    way.files([10, 50_000, 1 << 20]);
    way.push_whole().await;
    assert!(
        way.path.up.counts().duplicated > 50,
        "{:?}",
        way.path.up.counts()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shallow_queue_that_overflows_loses_no_byte() {
    let way = Way::new(Settings {
        rate: Some(2 << 20),
        queue: 16 << 10,
        ..settings()
    })
    .await;
    way.files([10, 50_000, 4 << 20]);
    way.push_whole().await;
    assert!(
        way.path.up.counts().dropped > 0,
        "{:?}",
        way.path.up.counts()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_small_files_arrive_over_ten_percent_loss() {
    let way = Way::new(Settings {
        loss: 0.1,
        ..settings()
    })
    .await;
    way.files((0..300).map(|i| i * 13 % 4_000));
    way.push_whole().await;
    assert!(
        way.path.up.counts().dropped > 10,
        "{:?}",
        way.path.up.counts()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_arrives_over_loss_as_well() {
    let way = Way::new(Settings {
        loss: 0.05,
        corrupt: 0.01,
        ..settings()
    })
    .await;
    for (i, size) in [0, 10, 5_000, 1 << 20].into_iter().enumerate() {
        write(
            &way.served.path().join(format!("t/{i}")),
            &content(i as u64, size),
        );
    }
    let client = way.connect(&patient()).await.unwrap();
    let options = crate::support::from(&["t"], &way.source.path().join("t"));
    let outcome = timeout(LIMIT, client.pull(&options, ignore()))
        .await
        .expect("it ends")
        .unwrap();
    assert_eq!((outcome.sent.files, outcome.sent.failed), (4, 0));
    assert_eq!(
        listing(&way.source.path().join("t")),
        listing(&way.served.path().join("t"))
    );
    assert!(
        way.path.down.counts().dropped > 10,
        "{:?}",
        way.path.down.counts()
    );
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_whose_nat_address_changes_keeps_its_connection() {
    const SIZE: u64 = 8 << 20;
    let (observer, moving) = moved(SIZE / 4);
    let way = Way::observed(
        Settings {
            rate: Some(4 << 20),
            ..settings()
        },
        observer,
    )
    .await;
    way.files([SIZE as usize]);
    let client = way.connect(&Config::default()).await.unwrap();
    let (observer, events) = recorder();
    let rebinding = async {
        moving.await.unwrap_err();
        let before = (
            way.path.addresses().len(),
            way.path.up.counts().forwarded_bytes,
        );
        way.path.rebind();
        before
    };
    let (outcome, (addresses, forwarded)) = tokio::join!(way.push(&client, observer), rebinding);
    way.arrived(&client, &outcome.unwrap(), &events.lock().unwrap());
    assert_eq!(way.path.addresses().len(), addresses + 1);
    let after = way.path.up.counts().forwarded_bytes - forwarded;
    assert!(after > SIZE / 4, "{after} bytes came from the new address");
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_is_dark_for_seconds_costs_no_reconnect() {
    dark_for(OUTAGE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "dark for 20 s, and quinn may take as long again to find that it is over"]
async fn a_path_that_is_dark_for_twenty_seconds_costs_no_reconnect() {
    dark_for(Duration::from_secs(20)).await;
}

async fn dark_for(time: Duration) {
    const SIZE: u64 = 8 << 20;
    let (observer, moving) = moved(SIZE / 4);
    let way = Way::observed(
        Settings {
            rate: Some(4 << 20),
            ..settings()
        },
        observer,
    )
    .await;
    way.files([SIZE as usize]);
    let client = way.connect(&Config::default()).await.unwrap();
    let (observer, events) = recorder();
    let outage = async {
        moving.await.unwrap_err();
        way.path.set(|path| path.blackout = true);
        let before = way.path.up.counts().forwarded;
        tokio::time::sleep(time).await;
        assert_eq!(way.path.up.counts().forwarded, before, "it was dark");
        way.path.set(|path| path.blackout = false);
    };
    let (outcome, ()) = tokio::join!(way.push(&client, observer), outage);
    way.arrived(&client, &outcome.unwrap(), &events.lock().unwrap());
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_drops_everything_is_unreachable_by_name() {
    let way = Way::new(Settings {
        blackout: true,
        ..settings()
    })
    .await;
    let config = Config {
        first_reply: Duration::from_millis(500),
        ..Config::default()
    };
    let error = way.connect(&config).await.err().expect("no connection");
    assert!(
        matches!(&error, Error::Unreachable { host, .. } if host == "127.0.0.1"),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(
        text.contains("127.0.0.1") && text.contains("nothing answers"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_that_breaks_off_counts_as_unreachable() {
    // The server's part of a handshake takes several datagrams; the client receives only the first.
    let way = Way::new(settings()).await;
    way.path.down.set(|down| down.dark_after = 1);
    let config = Config {
        handshake: Duration::from_secs(1),
        ..Config::default()
    };
    let error = way.connect(&config).await.err().expect("no connection");
    assert!(
        matches!(&error, Error::Unreachable { host, .. } if host == "127.0.0.1"),
        "{error:?}"
    );
    assert!(
        error.to_string().contains("the handshake did not end"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unlucky_handshake_is_overtaken_by_another() {
    let way = Way::new(Settings {
        first_connection_is_lost: true,
        ..settings()
    })
    .await;
    way.files([1000]);
    way.push_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_with_a_lost_end_is_redone_before_the_timeout() {
    // The client's first flight is two datagrams. Its next one completes the handshake for the client, and the server
    // receives none of it.
    let way = Way::new(Settings {
        of_first_client: 2,
        ..settings()
    })
    .await;
    way.files([1000]);
    let client = way
        .connect(&Config {
            idle_timeout: LIMIT * 2,
            ..patient()
        })
        .await
        .unwrap();
    let (observer, events) = recorder();
    let outcome = way.push(&client, observer).await.unwrap();
    let events = events.lock().unwrap();
    way.arrived(&client, &outcome, &events);
    let lost = events.iter().find_map(|event| {
        if let Event::Lost { reason: why, .. } = event {
            Some(why)
        } else {
            None
        }
    });
    assert!(
        lost.is_some_and(|why| why.contains("handshake")),
        "{lost:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rerun_after_a_dead_path_resumes_from_the_partial() {
    const SIZE: usize = 8 << 20;
    let dark: Arc<std::sync::OnceLock<Box<dyn Fn() + Send + Sync>>> = Arc::default();
    let then = dark.clone();
    let observer = once_moved(SIZE as u64 / 2, move || then.get().unwrap()());
    let way = Way::observed(settings(), observer).await;
    way.files([SIZE]);
    let (up, down) = (way.path.up.clone(), way.path.down.clone());
    let _ = dark.set(Box::new(move || {
        up.set(|up| up.blackout = true);
        down.set(|down| down.blackout = true);
    }));

    let second = Duration::from_secs(1);
    let config = Config {
        idle_timeout: second * 2,
        retry_for: second,
        first_reply: second,
        ..Config::default()
    };
    let client = way.connect(&config).await.unwrap();
    let (observer, events) = recorder();
    let lost = way.push(&client, observer).await;
    assert!(matches!(lost, Err(Error::Lost(_))), "{lost:?}");
    assert!(
        events
            .lock()
            .unwrap()
            .iter()
            .any(|event| matches!(event, Event::Reconnecting { .. })),
        "it was tried"
    );
    drop(client);
    assert!(!way.served.path().join("t/0/0").exists());

    way.path.set(|path| path.blackout = false);
    let client = way.connect(&Config::default()).await.unwrap();
    let (observer, events) = recorder();
    let outcome = way.push(&client, observer).await.unwrap();
    let held = events.lock().unwrap().iter().find_map(|event| match event {
        Event::Started { held, .. } => Some(*held),
        _ => None,
    });
    assert!(held > Some(1 << 20), "{held:?} bytes were there already");
    assert_eq!(outcome.sent.failed, 0, "{:?}", outcome.sent.failures);
    assert_eq!(
        listing(&way.served.path().join("t")),
        listing(&way.source.path().join("t"))
    );
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_resumes_when_the_path_returns_after_a_lost_connection() {
    const SIZE: usize = 8 << 20;
    let way = Way::new(settings()).await;
    way.files([SIZE, 100, 100]);
    let (up, down) = (way.path.up.clone(), way.path.down.clone());
    let dark = move |dark| {
        up.set(|up| up.blackout = dark);
        down.set(|down| down.blackout = dark);
    };
    let (kept, events) = recorder();
    let once = once_moved(SIZE as u64 / 2, {
        let dark = dark.clone();
        move || dark(true)
    });
    let observer: Observer = Arc::new(move |event: Event| {
        kept(event.clone());
        if let Event::Lost { .. } = event {
            dark(false);
        }
        once(event);
    });
    let config = Config {
        idle_timeout: Duration::from_secs(2),
        ..patient()
    };
    let client = way.connect(&config).await.unwrap();
    let outcome = way.push(&client, observer).await.unwrap();
    assert_eq!(
        (
            outcome.sent.entries,
            outcome.sent.files,
            outcome.sent.failed
        ),
        (7, 3, 0),
        "{:?}",
        outcome.sent.failures
    );
    assert_eq!(
        listing(&way.served.path().join("t")),
        listing(&way.source.path().join("t"))
    );
    let events = events.lock().unwrap();
    let count = |what: fn(&Event) -> bool| events.iter().filter(|event| what(event)).count();
    assert_eq!(count(|event| matches!(event, Event::Lost { .. })), 1);
    assert_eq!(count(|event| matches!(event, Event::Reconnected { .. })), 1);
    assert_eq!(count(|event| matches!(event, Event::Settled { .. })), 7);
}

/// The configurations of a server with little memory and a client that buffers little.
fn frugal() -> Config {
    Config {
        memory: 1 << 20,
        send_window: 512 << 10,
        ..patient()
    }
}

/// Bytes sent that both ends together may hold.
fn allowed(config: &Config) -> u64 {
    (config.memory + config.send_window) as u64
}

/// An observer that records the most bytes that a sender was ever ahead of a store.
fn ahead(store: &SlowStore) -> (Observer, Arc<AtomicU64>) {
    let (store, most, sent) = (
        store.clone(),
        Arc::new(AtomicU64::new(0)),
        AtomicU64::new(0),
    );
    let kept = most.clone();
    let observer: Observer = Arc::new(move |event| {
        if let Event::Moved { bytes, .. } = event {
            let sent = sent.fetch_add(bytes, Ordering::SeqCst) + bytes;
            kept.fetch_max(sent.saturating_sub(store.taken()), Ordering::SeqCst);
        }
    });
    (observer, most)
}

async fn way_to_slow_disk(
    rate: Option<u64>,
    config: Config,
    settings: Settings,
) -> (Way, SlowStore) {
    let served = tempdir().unwrap();
    let store = SlowStore::around(LocalStore::open(served.path()).unwrap(), rate);
    let host = Host::serving(Arc::new(store.clone()), config);
    (Way::of(host, served, settings).await, store)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_slower_than_a_lossy_path_stays_within_its_memory() {
    let config = frugal();
    let settings = Settings {
        loss: 0.01,
        ..settings()
    };
    let (way, store) = way_to_slow_disk(Some(1 << 20), config.clone(), settings).await;
    way.files([4 << 20]);
    let client = way.connect(&config).await.unwrap();
    let (observer, events) = recorder();
    let (watch, ahead) = ahead(&store);
    let outcome = way.push(&client, both(observer, watch)).await.unwrap();
    way.arrived(&client, &outcome, &events.lock().unwrap());
    let (ahead, bound) = (ahead.load(Ordering::SeqCst), allowed(&config));
    assert!(
        ahead <= bound,
        "{ahead} bytes were under way, of {bound} allowed"
    );
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_pauses_holds_the_sender_back() {
    stands_still(frugal()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_with_a_large_window_may_pause_as_well() {
    stands_still(patient()).await;
}

async fn stands_still(config: Config) {
    const SIZE: u64 = 6 << 20;
    let settings = Settings {
        loss: 0.02,
        ..settings()
    };
    let (way, store) = way_to_slow_disk(None, config.clone(), settings).await;
    way.files([SIZE as usize]);
    let held = store.hold();
    let client = way.connect(&config).await.unwrap();
    let (observer, events) = recorder();
    let (watch, ahead) = ahead(&store);
    let (tell, mut told) = mpsc::unbounded_channel();
    let tell: Observer = Arc::new(move |event| drop(tell.send(event)));
    let standing = async {
        while !matches!(told.recv().await.unwrap(), Event::Started { .. }) {}
        while let Ok(event) = timeout(QUIET, told.recv()).await {
            assert!(event.is_some(), "it ended with nothing written");
        }
        assert_eq!(store.taken(), 0);
        let ahead = ahead.load(Ordering::SeqCst);
        assert!(ahead < SIZE, "it was held back, and not done");
        drop(held);
    };
    let (outcome, ()) = tokio::join!(
        way.push(&client, both(both(observer, watch), tell)),
        standing
    );
    way.arrived(&client, &outcome.unwrap(), &events.lock().unwrap());
    let (ahead, bound) = (ahead.load(Ordering::SeqCst), allowed(&config));
    assert!(
        ahead <= bound,
        "{ahead} bytes were under way, of {bound} allowed"
    );
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_pauses_past_every_deadline_fails_no_file() {
    // Longer than the 5 s between two Workings.
    let deadline = Duration::from_secs(8);
    let config = Config {
        deadline,
        ..frugal()
    };
    let (way, store) = way_to_slow_disk(None, config.clone(), settings()).await;
    // The small files reserve half of the window, and the large ones hold at most the rest of it.
    let small = [8 << 10; 100];
    way.files([3 << 20, 3 << 20].into_iter().chain(small));
    let held = store.hold();
    let client = way.connect(&config).await.unwrap();
    let (observer, events) = recorder();
    let (begun, moving) = oneshot::channel();
    let begun = once_moved(1, move || begun.send(()).unwrap());
    let standing = async {
        moving.await.unwrap();
        // A silence is detected within twice its time.
        tokio::time::sleep(deadline * 2 + QUIET).await;
        assert_eq!(store.taken(), 0);
        drop(held);
    };
    let (outcome, ()) = tokio::join!(way.push(&client, both(observer, begun)), standing);
    way.arrived(&client, &outcome.unwrap(), &events.lock().unwrap());
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_server_waits_only_for_clients_that_are_alive() {
    let served = tempdir().unwrap();
    // Nothing else ends it during this test.
    let hour = Duration::from_secs(3600);
    let config = Config {
        grace: hour,
        idle_timeout: hour,
        deadline: hour,
        ..Config::default()
    };
    let host = Host::serving(Arc::new(LocalStore::open(served.path()).unwrap()), config);
    let mut way = Way::of(
        host,
        served,
        Settings {
            rate: Some(1 << 20),
            ..settings()
        },
    )
    .await;
    way.files([16 << 20]);
    write(&way.source.path().join("live"), &content(9, 3_000_000));

    let config = Config {
        retry_for: Duration::ZERO,
        idle_timeout: hour,
        ..patient()
    };
    let gone = way.connect(&config).await.unwrap();
    let (observer, moving) = moved(1 << 20);
    let options = to(&[&way.source.path().join("t")], "t");
    let pushing = tokio::spawn(async move { gone.push(&options, observer).await });
    moving.await.unwrap_err();

    // This takes longer than a server waits for a client that is gone.
    let config = Config {
        limit: haul::Rate::from_bytes(500_000),
        retry_for: Duration::ZERO,
        ..patient()
    };
    let live = way
        .host
        .connect_as(&Identity::generate().unwrap(), &config)
        .await
        .unwrap();
    let (observer, moving) = moved(1);
    let (options, live) = (to(&[&way.source.path().join("live")], "live"), &live);
    let stop = async {
        moving.await.unwrap_err();
        // As if the client had been killed: it does not close its connection.
        way.path.set(|path| path.blackout = true);
        way.host.stop();
    };
    let pushed = timeout(LIMIT, live.push(&options, observer));
    let (outcome, ()) = tokio::join!(pushed, stop);
    let sent = outcome.expect("it ends").unwrap().sent;
    assert_eq!((sent.files, sent.failed), (1, 0), "{:?}", sent.failures);
    way.host.stopped().await;
    assert!(!way.served.path().join("t/0/0").exists());
    pushing.abort();
}

/// Returns the last message of a server that is stopped while it lists a path. Everything that it sends is lost until
/// then.
async fn last_word_on(listed: &[u8]) -> u8 {
    let served = tempdir().unwrap();
    for i in 0..300 {
        write(
            &served.path().join(format!("d/a name of some length {i}")),
            b"",
        );
    }
    let store = SlowStore::around(LocalStore::open(served.path()).unwrap(), None);
    let mut host = Host::serving(Arc::new(store.clone()), Config::default());
    let path = Path::to(host.address, 1, settings()).await;
    let identity = Identity::generate().unwrap();
    let (_endpoint, connection) =
        Peer::connecting(path.address, host.key_id, &identity, |_| {}).await;
    let connection = connection.unwrap();
    path.down.set(|down| down.blackout = true);
    let before = path.down.counts().dropped;
    let (mut send, receive) = connection.open_bi().await.unwrap();
    let list = List {
        session: [1; 16],
        path: Components(vec![listed.to_vec()]),
        recursive: false,
    };
    let request = [&[1], &hello()[..], &list.to_bytes()].concat();
    send.write_all(&request).await.unwrap();
    let answered = async {
        // More than an acknowledgement is in flight.
        while store.looks() == 0 || path.down.counts().dropped < before + 2 {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, answered).await.expect("it answers");
    host.stop();
    path.down.set(|down| down.blackout = false);
    let mut answers = MessageReader::new(receive);
    let mut last = None;
    while let Some(frame) = timeout(LIMIT, answers.frame(1 << 20))
        .await
        .expect("it goes on")
        .expect("it ends cleanly")
    {
        last = Some(frame.kind);
    }
    connection.close(0_u8.into(), b"");
    host.stopped().await;
    last.expect("an answer")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_server_delivers_the_end_of_a_listing_first() {
    assert_eq!(last_word_on(b"d").await, End::TYPE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_server_delivers_a_refusal_first() {
    assert_eq!(last_word_on(b"nothing").await, Refused::TYPE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_ends_during_a_stop_gets_its_summary() {
    for _ in 0..10 {
        let (told, settled) = oneshot::channel::<()>();
        let told = std::sync::Mutex::new(Some(told));
        let committed: Observer = Arc::new(move |event: Event| {
            if matches!(event, Event::Settled { .. }) {
                drop(told.lock().unwrap().take());
            }
        });
        let mut way = Way::observed(settings(), committed).await;
        write(&way.source.path().join("f"), &content(1, 1000));
        let client = way
            .connect(&Config {
                retry_for: Duration::ZERO,
                ..patient()
            })
            .await
            .unwrap();
        let options = to(&[&way.source.path().join("f")], "f");
        let pushing = tokio::spawn(async move { client.push(&options, ignore()).await });
        settled.await.unwrap_err();
        way.host.stop();
        let outcome = timeout(LIMIT, pushing)
            .await
            .expect("it ends")
            .unwrap()
            .unwrap();
        assert_eq!((outcome.sent.files, outcome.summary.committed), (1, 1));
    }
}

/// Sends numbered datagrams over a path, one after the other. Returns those that arrived.
async fn arrivals(path: &Path, server: &UdpSocket, count: u64) -> Vec<u64> {
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let mut arrived = Vec::new();
    for number in 0..count {
        let before = path.up.counts();
        client
            .send_to(&number.to_be_bytes(), path.address)
            .await
            .unwrap();
        while path.up.counts() == before {
            tokio::task::yield_now().await;
        }
        if path.up.counts().dropped == before.dropped {
            let mut number = [0; 8];
            timeout(LIMIT, server.recv_from(&mut number))
                .await
                .expect("what is not dropped arrives")
                .unwrap();
            arrived.push(u64::from_be_bytes(number));
        }
    }
    arrived
}

#[tokio::test]
async fn the_impaired_path_does_what_its_settings_say() {
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let to = server.local_addr().unwrap();
    let lossy = Settings {
        loss: 0.3,
        ..Settings::default()
    };
    let mut all = Vec::new();
    for seed in [1, 1, 2] {
        let path = Path::to(to, seed, lossy.clone()).await;
        all.push(arrivals(&path, &server, 500).await);
        path.set(|path| path.blackout = true);
        assert!(arrivals(&path, &server, 10).await.is_empty());
        path.set(|path| {
            *path = Settings {
                corrupt: 1.0,
                ..Settings::default()
            }
        });
        let [number] = arrivals(&path, &server, 1).await[..] else {
            panic!("one arrives")
        };
        assert_eq!(number.count_ones(), 1, "one bit of it is another");
        assert_eq!(path.addresses().len(), 3, "one for each client");
        let address = path.address;
        drop(path);
        while UdpSocket::bind(address).await.is_err() {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(all[0], all[1]);
    assert_ne!(all[0], all[2]);
    assert!(
        (300..400).contains(&all[0].len()),
        "{} of 500",
        all[0].len()
    );
}
