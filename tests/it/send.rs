//! From machine to machine by a code, over real sockets.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::{LIMIT, content, listing, write};
use bytes::BytesMut;
use haul::internal::net::stream::MessageReader;
use haul::internal::protocol::{
    Confirm, Hello, Introduce, Introduced, Message, Refused, StreamType,
};
use haul::pairing::code::ShortCode;
use haul::pairing::offer::Content;
use haul::pairing::receive;
use haul::pairing::receive::Met;
use haul::pairing::route::Whereabouts;
use haul::pairing::send;
use haul::pairing::send::{Offering, SendOptions};
use haul::{
    Client, Code, Config, Error, Identity, KeyId, Outcome, PullOptions, RelativePath, ServerTrust,
    WalkOptions,
};
use tempfile::{TempDir, tempdir};
use tokio::time::timeout;

/// The files to send, and their directory.
struct Sending {
    source: TempDir,
    key_id: KeyId,
    offering: Offering,
}

fn options(sources: &[PathBuf]) -> SendOptions {
    SendOptions {
        content: Content::Files(sources.to_vec()),
        to: None,
        walk: WalkOptions::default(),
        from: "alice".into(),
        listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))],
        expires: Duration::from_secs(3600),
        relay: None,
        own: Vec::new(),
    }
}

fn whereabouts(addresses: &[SocketAddr]) -> Whereabouts {
    Whereabouts {
        addresses: addresses.to_vec(),
        relay: None,
        own: Vec::new(),
    }
}

async fn offering(options: SendOptions) -> (Offering, KeyId) {
    let identity = Identity::generate().unwrap();
    let key_id = identity.key_id();
    let offering = Offering::begin(options, identity, Config::default(), haul::ignore()).await;
    (offering.unwrap(), key_id)
}

impl Sending {
    /// A directory with a small file and a large one.
    async fn tree() -> Self {
        let source = tempdir().unwrap();
        write(&source.path().join("t/small"), &content(1, 10_000));
        write(&source.path().join("t/below/large"), &content(2, 3 << 20));
        let (offering, key_id) = offering(options(&[source.path().join("t")])).await;
        Self {
            source,
            key_id,
            offering,
        }
    }

    fn code(&self) -> ShortCode {
        self.offering.code().unwrap().clone()
    }

    fn at(&self) -> Vec<SocketAddr> {
        self.offering.addresses().to_vec()
    }
}

/// Another code of the same number.
fn wrong(code: &ShortCode) -> ShortCode {
    let text = code.to_string();
    let (most, last) = text.rsplit_once('-').unwrap();
    format!("{most}-{}", if last == "zoo" { "zone" } else { "zoo" })
        .parse()
        .unwrap()
}

async fn meet(
    code: &ShortCode,
    addresses: &[SocketAddr],
    identity: &Identity,
) -> Result<Met, Error> {
    timeout(
        LIMIT,
        receive::meet(
            &code.into(),
            whereabouts(addresses),
            identity,
            &Config::default(),
        ),
    )
    .await
    .expect("it ends")
}

async fn take(met: Met, to: &Path) -> Outcome {
    let options = PullOptions {
        sources: met.names().to_vec(),
        destination: to.to_owned(),
        into: true,
        literal: true,
        ..PullOptions::default()
    };
    let client = met.accept().await.unwrap().unwrap();
    let outcome = timeout(LIMIT, client.pull(&options, haul::ignore()))
        .await
        .expect("it ends")
        .unwrap();
    client.close_after_server().await;
    outcome
}

fn refused(result: Result<Met, Error>) -> Code {
    match result.map(|_| ()) {
        Err(Error::Refused(why)) => why.code,
        other => panic!("{other:?}"),
    }
}

/// A message of SPAKE2's receiver, made without any word: "B", and the base point of edwards25519 (RFC 8032, section 5.1).
fn exchange() -> [u8; 33] {
    let mut message = [0x66; 33];
    (message[0], message[1]) = (b'B', 0x58);
    message
}

/// An attacker who knows only the number.
struct Guess {
    connection: quinn::Connection,
    _send: quinn::SendStream,
    reader: MessageReader,
    _endpoint: quinn::Endpoint,
}

impl Guess {
    /// Asks, sends these further bytes, and receives the sender's part of an exchange.
    async fn begin(at: &[SocketAddr], code: &ShortCode, more: &[u8]) -> Self {
        let trust = haul::internal::auth::trust::trust_any_key(None);
        let (identity, config, port) = (
            Identity::generate().unwrap(),
            Config::default(),
            at[0].port(),
        );
        let connected =
            haul::internal::net::connect::connect(&identity, &trust, "127.0.0.1", port, &config)
                .await
                .unwrap();
        let (mut send, receive) = connected.connection.open_bi().await.unwrap();
        let mut bytes = BytesMut::from(&[StreamType::Introduction as u8][..]);
        Hello {
            features: vec![],
            agent: "guess".into(),
        }
        .put(&mut bytes);
        Introduce {
            number: code.number(),
            exchange: exchange(),
        }
        .put(&mut bytes);
        bytes.extend_from_slice(more);
        send.write_all(&bytes).await.unwrap();
        let mut reader = MessageReader::new(receive);
        reader.read::<Hello>().await.unwrap();
        reader.read::<Introduced>().await.unwrap();
        Self {
            connection: connected.connection,
            _send: send,
            reader,
            _endpoint: connected.endpoint,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_with_the_code_sees_the_offer_and_accepts_it() {
    let mut sending = Sending::tree().await;
    let (code, at, key_id, to) = (
        sending.code(),
        sending.at(),
        sending.key_id,
        tempdir().unwrap(),
    );
    let receiving = async {
        let met = meet(&code, &at, &Identity::generate().unwrap())
            .await
            .unwrap();
        assert_eq!(met.key_id(), key_id);
        let offer = met.offer();
        assert_eq!((offer.from.raw(), offer.directory), ("alice", true));
        assert_eq!((offer.files, offer.bytes), (2, 10_000 + (3 << 20)));
        assert_eq!(met.names(), [RelativePath::from_components(["t"]).unwrap()]);
        take(met, to.path()).await
    };
    let serving = async {
        assert!(matches!(
            sending.offering.meet().await.unwrap(),
            send::Met::Accepted { .. }
        ));
        assert!(sending.offering.code().is_none(), "it is used up");
        sending.offering.serve().await.unwrap()
    };
    let (received, sent) = tokio::join!(receiving, serving);
    assert_eq!((received.sent.files, received.sent.failed), (2, 0));
    assert_eq!((sent.sent.files, sent.sent.failed), (2, 0));
    assert_eq!(
        listing(&to.path().join("t")),
        listing(&sending.source.path().join("t"))
    );
    timeout(LIMIT, sending.offering.close()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_wrong_word_burns_the_code_and_a_new_one_works() {
    let mut sending = Sending::tree().await;
    let (code, at) = (sending.code(), sending.at());
    let stranger = Identity::generate().unwrap();
    let wrong = wrong(&code);
    let (guess, met) = tokio::join!(meet(&wrong, &at, &stranger), sending.offering.meet());
    assert_eq!(refused(guess), Code::NotAdmitted);
    assert!(matches!(met.unwrap(), send::Met::Burnt { .. }));
    // The right words come too late, and so do all further guesses: none of them gets an exchange.
    let late = async {
        for _ in 0..3 {
            assert_eq!(refused(meet(&code, &at, &stranger).await), Code::NotFound);
        }
    };
    tokio::select! {
        () = late => {}
        met = sending.offering.meet() => panic!("{met:?}"),
    }
    sending.offering.renew().await.unwrap();
    let new = sending.code();
    assert_ne!(new, code);
    let honest = Identity::generate().unwrap();
    let (met, accepted) = tokio::join!(
        async {
            meet(&new, &at, &honest)
                .await
                .unwrap()
                .accept()
                .await
                .unwrap()
                .unwrap()
        },
        sending.offering.meet()
    );
    assert!(matches!(accepted.unwrap(), send::Met::Accepted { .. }));
    met.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unused_numbers_and_broken_exchanges_burn_no_code() {
    let mut sending = Sending::tree().await;
    let (code, at) = (sending.code(), sending.at());
    let other: ShortCode = format!("1{code}").parse().unwrap();
    let tries = async {
        assert_eq!(
            refused(meet(&other, &at, &Identity::generate().unwrap()).await),
            Code::NotFound
        );
        // A receiver asks, and leaves before it sends its confirmation.
        let asked = Guess::begin(&at, &code, &[]).await;
        asked.connection.close(0_u8.into(), b"");
        meet(&code, &at, &Identity::generate().unwrap())
            .await
            .unwrap()
            .decline()
            .await;
    };
    let ((), met) = tokio::join!(tries, sending.offering.meet());
    assert!(matches!(met.unwrap(), send::Met::Declined { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_confirmation_burns_the_code_and_reveals_nothing() {
    let mut sending = Sending::tree().await;
    let (code, at) = (sending.code(), sending.at());
    let guess = async {
        let Guess {
            mut reader,
            connection: _connection,
            ..
        } = Guess::begin(&at, &code, &Confirm { tag: [0; 32] }.to_bytes()).await;
        let refused: Refused = reader.read().await.unwrap();
        assert_eq!(haul::Reason::from(refused.why).code, Code::NotAdmitted);
        assert!(
            reader.frame(65536).await.unwrap().is_none(),
            "no confirmation, no offer"
        );
    };
    let ((), met) = tokio::join!(guess, sending.offering.meet());
    assert!(matches!(met.unwrap(), send::Met::Burnt { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_code_nothing_can_be_read_listed_or_written() {
    let sending = Sending::tree().await;
    let trust = ServerTrust {
        pin: Some(sending.key_id),
        ..ServerTrust::default()
    };
    let port = sending.at()[0].port();
    let identity = Identity::generate().unwrap();
    let client = Client::connect(&identity, &trust, "127.0.0.1", port, &Config::default())
        .await
        .unwrap();
    let to = tempdir().unwrap();
    let options = crate::support::from(&["t"], to.path());
    let not_allowed =
        |error: Error| matches!(&error, Error::Refused(why) if why.code == Code::NotAllowed);
    assert!(not_allowed(
        client.pull(&options, haul::ignore()).await.unwrap_err()
    ));
    let listed = async {
        client
            .list(&RelativePath::root(), false)
            .await?
            .next()
            .await
            .map(|_| ())
    };
    assert!(not_allowed(listed.await.unwrap_err()));
    let own = to.path().join("own");
    write(&own, b"own");
    assert!(not_allowed(
        client
            .push(&crate::support::to(&[&own], "own"), haul::ignore())
            .await
            .unwrap_err()
    ));
    assert!(
        listing(to.path())
            .iter()
            .all(|line| !line.contains('t') || line.contains("own"))
    );
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_same_receiver_resumes_with_a_used_code() {
    let mut sending = Sending::tree().await;
    let (code, at, to) = (sending.code(), sending.at(), tempdir().unwrap());
    let identity = Identity::generate().unwrap();
    let receiving = async {
        let met = meet(&code, &at, &identity).await.unwrap();
        // It accepted, and left before it requested anything.
        drop(met.accept().await.unwrap().unwrap());
        assert_eq!(
            refused(meet(&code, &at, &Identity::generate().unwrap()).await),
            Code::NotFound
        );
        take(meet(&code, &at, &identity).await.unwrap(), to.path()).await
    };
    let serving = async {
        assert!(matches!(
            sending.offering.meet().await.unwrap(),
            send::Met::Accepted { .. }
        ));
        sending.offering.serve().await.unwrap()
    };
    let (received, sent) = tokio::join!(receiving, serving);
    assert_eq!((received.sent.files, received.sent.failed), (2, 0));
    assert_eq!(sent.sent.failed, 0);
    assert_eq!(
        listing(&to.path().join("t")),
        listing(&sending.source.path().join("t"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_has_not_accepted_gets_nothing() {
    let mut sending = Sending::tree().await;
    let (code, at, key_id, to) = (
        sending.code(),
        sending.at(),
        sending.key_id,
        tempdir().unwrap(),
    );
    let identity = Identity::generate().unwrap();
    let receiving = async {
        let met = meet(&code, &at, &identity).await.unwrap();
        let trust = ServerTrust {
            pin: Some(key_id),
            ..ServerTrust::default()
        };
        let client = Client::connect(
            &identity,
            &trust,
            "127.0.0.1",
            at[0].port(),
            &Config::default(),
        )
        .await
        .unwrap();
        let pulled = client
            .pull(&crate::support::from(&["t"], to.path()), haul::ignore())
            .await;
        assert!(matches!(pulled, Err(Error::Refused(why)) if why.code == Code::NotAllowed));
        met.decline().await;
    };
    let ((), met) = tokio::join!(receiving, sending.offering.meet());
    assert!(matches!(met.unwrap(), send::Met::Declined { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_earlier_receiver_does_not_end_the_next_code() {
    let mut sending = Sending::tree().await;
    for _ in 0..2 {
        let (code, at, to) = (sending.code(), sending.at(), tempdir().unwrap());
        let receiving = async {
            take(
                meet(&code, &at, &Identity::generate().unwrap())
                    .await
                    .unwrap(),
                to.path(),
            )
            .await
        };
        let serving = async {
            assert!(matches!(
                sending.offering.meet().await.unwrap(),
                send::Met::Accepted { .. }
            ));
            sending.offering.serve().await.unwrap()
        };
        let (received, sent) = tokio::join!(receiving, serving);
        assert_eq!((received.sent.files, sent.sent.files), (2, 2));
        sending.offering.renew().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_needs_no_names() {
    let source = tempdir().unwrap();
    for name in ["*", "a[b]", "other"] {
        write(&source.path().join(name), name.as_bytes());
    }
    let (mut stars, _) = offering(options(&[
        source.path().join("*"),
        source.path().join("a[b]"),
    ]))
    .await;
    let (code, at, to) = (
        stars.code().unwrap().clone(),
        stars.addresses().to_vec(),
        tempdir().unwrap(),
    );
    let receiving = async {
        take(
            meet(&code, &at, &Identity::generate().unwrap())
                .await
                .unwrap(),
            to.path(),
        )
        .await
    };
    let serving = async {
        stars.meet().await.unwrap();
        stars.serve().await.unwrap()
    };
    let (received, _) = tokio::join!(receiving, serving);
    assert_eq!((received.sent.files, received.sent.failed), (2, 0));
    for name in ["*", "a[b]"] {
        assert_eq!(
            std::fs::read(to.path().join(name)).unwrap(),
            name.as_bytes()
        );
    }

    let (mut text, _) = offering(SendOptions {
        content: Content::Text("under the mat".into()),
        ..options(&[])
    })
    .await;
    let (code, at) = (text.code().unwrap().clone(), text.addresses().to_vec());
    let receiving = async {
        let met = meet(&code, &at, &Identity::generate().unwrap())
            .await
            .unwrap();
        assert_eq!(met.offer().text, Some("under the mat".into()));
        assert!(met.accept().await.unwrap().is_none());
    };
    let ((), met) = tokio::join!(receiving, text.meet());
    assert!(matches!(met.unwrap(), send::Met::Accepted { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_options_are_reported_before_a_code_is_made() {
    let source = tempdir().unwrap();
    write(&source.path().join("a"), b"a");
    write(&source.path().join("b/a"), b"a");
    let begin = |options: SendOptions| async {
        let identity = Identity::generate().unwrap();
        Offering::begin(options, identity, Config::default(), haul::ignore())
            .await
            .map(|_| ())
    };
    let usage = |error| matches!(error, Err(Error::Usage(_)));
    assert!(usage(begin(options(&[])).await));
    assert!(usage(
        begin(options(&[
            source.path().join("a"),
            source.path().join("b/a")
        ]))
        .await
    ));
    assert!(usage(
        begin(SendOptions {
            content: Content::Text("x".repeat(40_000)),
            ..options(&[])
        })
        .await
    ));
    let missing = begin(options(&[source.path().join("missing")])).await;
    assert!(matches!(missing, Err(Error::Refused(why)) if why.code == Code::NotFound));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_is_stopped_tells_its_receiver_at_once() {
    let mut sending = Sending::tree().await;
    let (code, at, to) = (sending.code(), sending.at(), tempdir().unwrap());
    // So slow that it outlasts any grace period.
    let slow = Config {
        limit: haul::Rate::from_bytes(20_000),
        retry_for: Duration::ZERO,
        ..Config::default()
    };
    let (moving, moves) = tokio::sync::oneshot::channel();
    let moving = std::sync::Mutex::new(Some(moving));
    let observer: haul::Observer = std::sync::Arc::new(move |event| {
        if matches!(event, haul::Event::Started { .. })
            && let Some(moving) = moving.lock().unwrap().take()
        {
            let _ = moving.send(());
        }
    });
    let receiving = async {
        let met = receive::meet(
            &(&code).into(),
            whereabouts(&at),
            &Identity::generate().unwrap(),
            &slow,
        )
        .await
        .unwrap();
        let sources = met.names().to_vec();
        let options = PullOptions {
            sources,
            destination: to.path().into(),
            into: true,
            ..PullOptions::default()
        };
        let client = met.accept().await.unwrap().unwrap();
        timeout(LIMIT, client.pull(&options, observer))
            .await
            .expect("it ends")
    };
    let serving = async {
        sending.offering.meet().await.unwrap();
        moves.await.unwrap();
        timeout(LIMIT, sending.offering.stop())
            .await
            .expect("it ends");
    };
    let (received, ()) = tokio::join!(receiving, serving);
    // Unlike a server that may be restarted: there is nothing to wait for.
    assert!(
        matches!(&received, Err(Error::Refused(why)) if why.code == Code::Cancelled),
        "{received:?}"
    );
    assert!(!to.path().join("t/below/large").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_code_admits_no_receiver() {
    let source = tempdir().unwrap();
    write(&source.path().join("a"), b"a");
    let options = SendOptions {
        expires: Duration::from_millis(200),
        ..options(&[source.path().join("a")])
    };
    let (mut offering, _) = offering(options).await;
    let (code, at) = (
        offering.code().unwrap().clone(),
        offering.addresses().to_vec(),
    );
    assert!(matches!(offering.meet().await.unwrap(), send::Met::Expired));
    let late = async { refused(meet(&code, &at, &Identity::generate().unwrap()).await) };
    tokio::select! {
        code = late => assert_eq!(code, Code::NotFound),
        met = offering.meet() => panic!("{met:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_that_quits_early_does_not_leave_a_receiver_waiting() {
    let mut sending = Sending::tree().await;
    let (code, at) = (sending.code(), sending.at());
    let identity = Identity::generate().unwrap();
    let met = tokio::select! {
        met = meet(&code, &at, &identity) => met.unwrap(),
        met = sending.offering.meet() => panic!("{met:?}"),
    };
    timeout(LIMIT, sending.offering.stop())
        .await
        .expect("it ends");
    let accepted = timeout(LIMIT, met.accept()).await.expect("it ends");
    assert!(
        matches!(accepted, Err(Error::Refused(why)) if why.code == Code::Cancelled),
        "it is gone, and says why"
    );
}

/// Begins a pull so slow that it is under way for a long time. Returns once any of it moves.
async fn slowly(met: Met, to: &Path) -> Client {
    let (moving, moves) = tokio::sync::oneshot::channel();
    let moving = std::sync::Mutex::new(Some(moving));
    let observer: haul::Observer = std::sync::Arc::new(move |event| {
        if matches!(event, haul::Event::Started { .. })
            && let Some(moving) = moving.lock().unwrap().take()
        {
            let _ = moving.send(());
        }
    });
    let (sources, destination) = (met.names().to_vec(), to.to_owned());
    let pull = PullOptions {
        sources,
        destination,
        into: true,
        literal: true,
        ..PullOptions::default()
    };
    let client = std::sync::Arc::new(met.accept().await.unwrap().unwrap());
    let pulling = {
        let client = client.clone();
        tokio::spawn(async move { drop(client.pull(&pull, observer).await) })
    };
    timeout(LIMIT, moves).await.expect("it begins").unwrap();
    pulling.abort();
    let _ = pulling.await;
    std::sync::Arc::into_inner(client).expect("nobody else has it")
}

/// Offers Alice's tree at a rate that takes minutes; the sender does not wait for a receiver that is gone.
async fn slow_tree() -> Sending {
    let source = tempdir().unwrap();
    write(&source.path().join("t/large"), &content(2, 3 << 20));
    let identity = Identity::generate().unwrap();
    let key_id = identity.key_id();
    let patience = Duration::from_millis(300);
    let config = Config {
        limit: haul::Rate::from_bytes(20_000),
        retry_for: patience,
        ..Config::default()
    };
    let options = options(&[source.path().join("t")]);
    let offering = Offering::begin(options, identity, config, haul::ignore())
        .await
        .unwrap();
    Sending {
        source,
        key_id,
        offering,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_closes_early_did_not_get_everything() {
    let mut sending = slow_tree().await;
    let (code, at, to) = (sending.code(), sending.at(), tempdir().unwrap());
    let receiving = async {
        let met = meet(&code, &at, &Identity::generate().unwrap())
            .await
            .unwrap();
        slowly(met, to.path()).await
    };
    let (client, accepted) = tokio::join!(receiving, sending.offering.meet());
    assert!(matches!(accepted.unwrap(), send::Met::Accepted { .. }));
    // From here on the sender counts the time; its receiver has arrived.
    let serving = timeout(LIMIT, sending.offering.serve());
    let (served, ()) = tokio::join!(serving, client.close());
    let served = served.expect("it ends");
    assert!(matches!(served, Err(Error::Lost(_))), "{served:?}");
    assert!(!to.path().join("t/large").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_returns_and_declines_ends_the_send() {
    let mut sending = slow_tree().await;
    let (code, at, to) = (sending.code(), sending.at(), tempdir().unwrap());
    let identity = Identity::generate().unwrap();
    let receiving = async {
        let met = meet(&code, &at, &identity).await.unwrap();
        slowly(met, to.path()).await
    };
    let (client, accepted) = tokio::join!(receiving, sending.offering.meet());
    assert!(matches!(accepted.unwrap(), send::Met::Accepted { .. }));
    let declining = async {
        // In another process of the same user, while this one still has its connection.
        meet(&code, &at, &identity).await.unwrap().decline().await;
        client.cancel().await;
    };
    // From here on the sender counts the time; its receiver has arrived.
    let serving = timeout(LIMIT, sending.offering.serve());
    let ((), served) = tokio::join!(declining, serving);
    let served = served.expect("it ends");
    assert!(
        matches!(served, Err(Error::Lost(_) | Error::Refused(_))),
        "{served:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_left_the_question_open_may_return_at_once() {
    let mut sending = Sending::tree().await;
    let (code, at, to) = (sending.code(), sending.at(), tempdir().unwrap());
    let identity = Identity::generate().unwrap();
    let receiving = async {
        // Its user is asked, and neither answers nor leaves.
        let open = meet(&code, &at, &identity).await.unwrap();
        let outcome = take(meet(&code, &at, &identity).await.unwrap(), to.path()).await;
        drop(open);
        outcome
    };
    let serving = async {
        assert!(matches!(
            sending.offering.meet().await.unwrap(),
            send::Met::Accepted { .. }
        ));
        sending.offering.serve().await.unwrap()
    };
    let (received, _) = timeout(LIMIT, async { tokio::join!(receiving, serving) })
        .await
        .expect("it ends");
    assert_eq!((received.sent.files, received.sent.failed), (2, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_earlier_receiver_gets_nothing_of_the_next_offer() {
    let mut sending = Sending::tree().await;
    let (code, at, key_id, to) = (
        sending.code(),
        sending.at(),
        sending.key_id,
        tempdir().unwrap(),
    );
    let identity = Identity::generate().unwrap();
    let receiving = async {
        let met = meet(&code, &at, &identity).await.unwrap();
        let client = met.accept().await.unwrap().unwrap();
        let trust = ServerTrust {
            pin: Some(key_id),
            ..ServerTrust::default()
        };
        let kept = Client::connect(
            &identity,
            &trust,
            "127.0.0.1",
            at[0].port(),
            &Config::default(),
        )
        .await
        .unwrap();
        let pull = PullOptions {
            into: true,
            ..crate::support::from(&["t"], &to.path().join("first"))
        };
        client.pull(&pull, haul::ignore()).await.unwrap();
        client.close_after_server().await;
        kept
    };
    let serving = async {
        assert!(matches!(
            sending.offering.meet().await.unwrap(),
            send::Met::Accepted { .. }
        ));
        sending.offering.serve().await.unwrap()
    };
    let (kept, _) = timeout(LIMIT, async { tokio::join!(receiving, serving) })
        .await
        .expect("it ends");
    sending.offering.renew().await.unwrap();
    write(&sending.source.path().join("t/later"), b"later");
    let pulled = kept
        .pull(
            &crate::support::from(&["t"], &to.path().join("second")),
            haul::ignore(),
        )
        .await;
    assert!(matches!(pulled, Err(Error::Refused(why)) if why.code == Code::NotAllowed));
    assert!(!to.path().join("second").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_unknown_size_is_not_offered() {
    let proc = PathBuf::from("/proc/version");
    if !proc.exists() {
        return eprintln!("skipped: there is no /proc");
    }
    let (offering, _) = offering(options(&[proc])).await;
    let code = offering.code().unwrap().clone();
    let at = offering.addresses().to_vec();
    let mut offering = offering;
    let receiver = async {
        let identity = Identity::generate().unwrap();
        let met = meet(&code, &at, &identity).await.unwrap();
        let to = tempdir().unwrap();
        let options = PullOptions {
            sources: met.names().to_vec(),
            destination: to.path().to_owned(),
            into: true,
            literal: true,
            quota: Some(haul::AcceptedQuota::of(met.offer())),
            ..PullOptions::default()
        };
        let client = met.accept().await.unwrap().unwrap();
        let outcome = client.pull(&options, haul::ignore()).await;
        client.close_after_server().await;
        outcome.unwrap()
    };
    let sender = async {
        offering.meet().await.unwrap();
        offering.serve().await.unwrap()
    };
    let (received, sent) = timeout(LIMIT, async { tokio::join!(receiver, sender) })
        .await
        .expect("it ends");
    for outcome in [received, sent] {
        let [(name, why)] = &outcome.sent.failures[..] else {
            panic!("{outcome:?}")
        };
        assert_eq!((&*name.to_string(), why.code), ("version", Code::NotWanted));
        assert!(why.text.contains("haul send -"), "{why}");
    }
}
