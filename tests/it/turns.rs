//! Two sessions of one key that send the same files: they take turns, neither fails, and the files are whole.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};

use crate::support::command::private;
use crate::support::slow::SlowStore;
use crate::support::{Host, LIMIT, content, listing, recorder, to, write};
use haul::{
    Config, Durability, Event, Existing, Identity, LocalStore, Observer, Outcome, PushOptions,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::{TempDir, tempdir};
use tokio::task::JoinHandle;

/// Makes several files of each kind: empty, small, and large enough to need a permit.
fn tree(root: &Path) {
    for (kind, size) in [("empty", 0), ("small", 5_000), ("large", 600_000)] {
        for at in 0..3 {
            let seed = size as u64 + at;
            write(&root.join(format!("{kind}/{at}")), &content(seed, size));
        }
    }
    std::fs::hard_link(root.join("large/0"), root.join("large/name")).unwrap();
}

struct Two {
    source: TempDir,
    served: TempDir,
    store: SlowStore,
    host: Host,
    identity: Identity,
}

impl Two {
    fn new() -> Self {
        let (source, served) = (tempdir().unwrap(), tempdir().unwrap());
        tree(&source.path().join("t"));
        let store = SlowStore::around(LocalStore::open(served.path()).unwrap(), None);
        let host = Host::serving(Arc::new(store.clone()), Config::default());
        Self {
            source,
            served,
            store,
            host,
            identity: Identity::generate().unwrap(),
        }
    }

    async fn push(
        &self,
        what: &str,
        existing: Existing,
        observer: Observer,
    ) -> JoinHandle<Outcome> {
        let client = self
            .host
            .connect_as(&self.identity, &Config::default())
            .await
            .unwrap();
        let mut options = PushOptions {
            durability: Durability::Synced,
            ..to(&[&self.source.path().join(what)], what)
        };
        options.take.existing = existing;
        tokio::spawn(async move {
            let outcome = client.push(&options, observer).await.unwrap();
            client.close().await;
            outcome
        })
    }

    fn check(&self, outcomes: &[Outcome]) {
        for outcome in outcomes {
            let sent = &outcome.sent;
            assert_eq!(sent.failed, 0, "{:?}", sent.failures);
            assert!(sent.interrupted.is_none());
        }
        let [here, there] =
            [&self.source, &self.served].map(|root| listing(&root.path().join("t")));
        assert_eq!(there, here);
    }
}

async fn ended(pushing: JoinHandle<Outcome>) -> Outcome {
    tokio::time::timeout(LIMIT, pushing)
        .await
        .expect("it ends")
        .unwrap()
}

/// Waits until an observer has seen this event.
async fn heard(events: &Mutex<Vec<Event>>, what: impl Fn(&Event) -> bool) {
    let all = async {
        while !events.lock().unwrap().iter().any(&what) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, all)
        .await
        .expect("it is heard of");
}

fn is_all_found(event: &Event) -> bool {
    matches!(event, Event::Found { complete: true, .. })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_newer_session_waits_for_the_older_one() {
    for existing in [Existing::Update, Existing::Overwrite] {
        let two = Two::new();
        let held = two.store.hold();
        let (observer, events) = recorder();
        let first = two.push("t", existing, observer).await;
        heard(&events, is_all_found).await;
        heard(&events, |event| matches!(event, Event::Moved { .. })).await;
        let (observer, events) = recorder();
        let second = two.push("t", existing, observer).await;
        heard(&events, is_all_found).await;
        drop(held);
        two.check(&[ended(first).await, ended(second).await]);
    }
}

/// Whether it is closed, and a change of that.
type Gate = Arc<(Mutex<bool>, Condvar)>;

/// An observer that pauses at the first file that is found, until the test continues.
fn halting() -> (Observer, Gate, Arc<tokio::sync::Notify>) {
    let gate = Arc::new((Mutex::new(true), Condvar::new()));
    let reached = Arc::new(tokio::sync::Notify::new());
    let (waits, halted) = (gate.clone(), reached.clone());
    let observer: Observer = Arc::new(move |event| {
        if matches!(event, Event::Found { .. }) {
            halted.notify_one();
            tokio::task::block_in_place(|| {
                let (closed, changed) = &*waits;
                drop(changed.wait_while(closed.lock().unwrap(), |closed| *closed));
            });
        }
    });
    (observer, gate, reached)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_older_session_waits_for_a_newer_one() {
    let two = Two::new();
    let (observer, gate, reached) = halting();
    let older = two.push("t", Existing::Update, observer).await;
    tokio::time::timeout(LIMIT, reached.notified())
        .await
        .expect("it has begun");
    let held = two.store.hold();
    let (observer, events) = recorder();
    let newer = two.push("t", Existing::Update, observer).await;
    heard(&events, |event| matches!(event, Event::Moved { .. })).await;
    *gate.0.lock().unwrap() = false;
    gate.1.notify_all();
    heard(&events, is_all_found).await;
    drop(held);
    two.check(&[ended(older).await, ended(newer).await]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sessions_that_begin_together_both_succeed() {
    let two = Two::new();
    let ignore = haul::ignore;
    let mut pushing = Vec::new();
    for _ in 0..4 {
        pushing.push(two.push("t", Existing::Update, ignore()).await);
    }
    let mut outcomes = Vec::new();
    for one in pushing {
        outcomes.push(ended(one).await);
    }
    two.check(&outcomes);
}

/// Runs `haul cp` of a tree, as the user of one machine types it.
fn haul_cp(home: &Path, host: &Host, source: &Path, more: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_haul"))
        .args(["cp", "--pin", &host.key_id.to_string()])
        .args(more)
        .arg(source)
        .arg(format!("haul://127.0.0.1:{}/", host.address.port()))
        .env("HAUL_HOME", home)
        .env_remove("HAUL_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

async fn exits_well(child: Child) {
    let waited = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    let output = tokio::time::timeout(LIMIT, waited)
        .await
        .expect("it ends")
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(!said.contains("took over"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_suspended_client_takes_its_turn() {
    let (two, home) = (Two::new(), private());
    let source = two.source.path().join("t");
    write(&source.join("slow"), &content(1, 8 << 20));
    // Slow enough that the transfer is under way when the process is stopped.
    let behind = haul_cp(home.path(), &two.host, &source, &["--limit", "1MB/s"]);
    let some = async {
        while two.store.taken() < 500_000 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, some).await.expect("it sends");
    let process = Pid::from_child(&behind);
    kill_process(process, Signal::STOP).unwrap();
    let again = haul_cp(home.path(), &two.host, &source, &[]);
    exits_well(again).await;
    two.check(&[]);
    kill_process(process, Signal::CONT).unwrap();
    exits_well(behind).await;
    two.check(&[]);
}
