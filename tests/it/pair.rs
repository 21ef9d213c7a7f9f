//! Paired machines: what pairing stores at both ends, and what works without a code from then on.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::support::{LIMIT, content, listing, write};
use haul::pairing::code::Credential;
use haul::pairing::offer::Content;
use haul::pairing::pair;
use haul::pairing::pair::Paired;
use haul::pairing::receive;
use haul::pairing::rendezvous::RelayAt;
use haul::pairing::route::Whereabouts;
use haul::pairing::send::{Met, Offering, SendOptions};
use haul::peers;
use haul::peers::Peer;
use haul::{
    Admission, Allowance, Anyone, Client, Code, Config, Error, Home, Identity, KeyId, LocalStore,
    Outcome, Pipe, PullOptions, Relay, RelayOptions, Server, ServerOptions, WalkOptions,
};
use tempfile::tempdir;
use tokio::time::timeout;

fn options(content: Content, to: Option<Peer>) -> SendOptions {
    SendOptions {
        content,
        to,
        walk: WalkOptions::default(),
        from: "alice".into(),
        listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))],
        expires: Duration::from_secs(3600),
        relay: None,
        own: Vec::new(),
    }
}

async fn offering(options: SendOptions, identity: &Identity) -> Offering {
    Offering::begin(options, identity.clone(), Config::default(), haul::ignore())
        .await
        .unwrap()
}

fn at(offering: &Offering) -> Whereabouts {
    Whereabouts {
        addresses: offering.addresses().to_vec(),
        ..Whereabouts::default()
    }
}

async fn meet(
    credential: &Credential,
    at: Whereabouts,
    identity: &Identity,
) -> Result<receive::Met, Error> {
    timeout(
        LIMIT,
        receive::meet(credential, at, identity, &Config::default()),
    )
    .await
    .expect("it ends")
}

/// Accepts every offer.
async fn take(met: receive::Met, to: &Path) -> Outcome {
    let (sources, destination) = (met.names().to_vec(), to.to_owned());
    let client = met.accept().await.unwrap().unwrap();
    let pull = PullOptions {
        sources,
        destination,
        into: true,
        literal: true,
        ..PullOptions::default()
    };
    let outcome = client.pull(&pull, haul::ignore()).await.unwrap();
    client.close_after_server().await;
    outcome
}

/// What two paired machines know of each other: the first of the second, and the second of the first.
async fn paired(one: &Identity, other: &Identity) -> [Peer; 2] {
    let mut offering = offering(options(Content::Pair, None), one).await;
    let (credential, at) = (offering.code().unwrap().into(), at(&offering));
    let typed = async {
        meet(&credential, at, other)
            .await
            .unwrap()
            .pair()
            .await
            .unwrap()
    };
    let (typed, shown) = tokio::join!(typed, offering.meet());
    let Met::Paired(shown) = shown.unwrap() else {
        panic!("not paired")
    };
    assert!(offering.code().is_none(), "it is used up");
    let peer = |name: &str,
                Paired {
                    key_id,
                    secret,
                    number,
                }| Peer {
        name: name.parse().unwrap(),
        key_id,
        secret,
        number,
    };
    [peer("bob", shown), peer("alice", typed)]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_code_pairs_both_ends() {
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let [of_bob, of_alice] = paired(&alice, &bob).await;
    assert_eq!(
        (of_bob.key_id, of_alice.key_id),
        (bob.key_id(), alice.key_id())
    );
    assert_eq!(of_bob.secret, of_alice.secret);
    assert_eq!(
        (of_bob.number, of_alice.number),
        (pair::number_of_server(&bob), pair::number_of_server(&alice))
    );
    let [again, _] = paired(&alice, &bob).await;
    assert_ne!(
        again.secret, of_bob.secret,
        "each pairing has a secret of its own"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paired_machines_need_no_code_and_strangers_burn_nothing() {
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let [of_bob, of_alice] = paired(&alice, &bob).await;
    let (source, to) = (tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("t/a"), &content(1, 100_000));
    let mut offering = offering(
        options(Content::Files(vec![source.path().join("t")]), Some(of_bob)),
        &alice,
    )
    .await;
    assert!(offering.code().is_none());
    let (credential, at) = (pair::sent_by(&of_alice), at(&offering));
    assert_eq!(offering.number(), Some(credential.number()));
    let receiving = async {
        // An attacker with the secret lacks the key, and an earlier peer lacks the secret.
        let stranger = meet(&credential, at.clone(), &Identity::generate().unwrap()).await;
        assert!(matches!(stranger, Err(Error::Refused(why)) if why.code == Code::NotFound));
        let stale = pair::sent_by(&Peer {
            secret: [0; 32],
            ..of_alice.clone()
        });
        assert!(
            matches!(meet(&stale, at.clone(), &bob).await, Err(Error::Refused(why)) if why.code == Code::NotFound)
        );
        let met = meet(&credential, at, &bob).await.unwrap();
        take(met, to.path()).await
    };
    let sending = async {
        assert!(matches!(
            offering.meet().await.unwrap(),
            Met::Accepted { .. }
        ));
        offering.serve().await.unwrap()
    };
    let (received, sent) = timeout(LIMIT, async { tokio::join!(receiving, sending) })
        .await
        .expect("it ends");
    assert_eq!((received.sent.files, sent.sent.files), (1, 1));
    assert_eq!(listing(to.path()), listing(source.path()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_offer_of_files_does_not_pair() {
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let mut offering = offering(options(Content::Text("hello".into()), None), &alice).await;
    let (credential, at) = (offering.code().unwrap().into(), at(&offering));
    let typed = async { meet(&credential, at, &bob).await.unwrap().pair().await };
    let (typed, shown) = tokio::join!(typed, offering.meet());
    assert!(matches!(typed, Err(Error::Usage(_))));
    assert!(matches!(shown.unwrap(), Met::Declined { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn piped_input_goes_whole_to_one_receiver() {
    let (alice, bob, to) = (
        Identity::generate().unwrap(),
        Identity::generate().unwrap(),
        tempdir().unwrap(),
    );
    let bytes = content(3, 2 << 20);
    let pipe = Pipe::new(std::io::Cursor::new(bytes.clone()));
    let mut offering = offering(
        options(Content::Pipe(b"d.tar".to_vec(), pipe), None),
        &alice,
    )
    .await;
    let (credential, at) = (offering.code().unwrap().into(), at(&offering));
    let receiving = async {
        let met = meet(&credential, at.clone(), &bob).await.unwrap();
        assert_eq!(
            (met.offer().piped, met.offer().files, met.names().len()),
            (Some(true), 1, 1)
        );
        take(met, to.path()).await
    };
    let sending = async {
        assert!(matches!(
            offering.meet().await.unwrap(),
            Met::Accepted { .. }
        ));
        offering.serve().await.unwrap()
    };
    let (received, _) = timeout(LIMIT, async { tokio::join!(receiving, sending) })
        .await
        .expect("it ends");
    assert_eq!((received.sent.files, received.sent.failed), (1, 0));
    assert!(std::fs::read(to.path().join("d.tar")).unwrap() == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_finds_its_sender_and_no_other() {
    let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let own = vec![Ipv4Addr::LOCALHOST.into()];
    let mut offering = offering(
        SendOptions {
            own,
            ..options(Content::Text("hello".into()), None)
        },
        &alice,
    )
    .await;
    let ticket = offering.ticket().unwrap();
    assert_eq!(
        (ticket.key_id, &ticket.addresses[..]),
        (alice.key_id(), offering.addresses())
    );
    let receiving = async {
        let other = haul::pairing::ticket::Ticket {
            key_id: KeyId([7; 32]),
            ..ticket.clone()
        };
        let swapped = meet(&other.credential(), other.whereabouts(None, vec![]), &bob).await;
        assert!(
            matches!(swapped, Err(Error::WrongPin { .. })),
            "nothing was said to it"
        );
        let met = meet(&ticket.credential(), ticket.whereabouts(None, vec![]), &bob)
            .await
            .unwrap();
        assert_eq!(met.offer().text, Some("hello".into()));
        assert!(met.accept().await.unwrap().is_none());
    };
    let ((), met) = tokio::join!(receiving, offering.meet());
    assert!(matches!(met.unwrap(), Met::Accepted { .. }));
}

/// A relay on loopback.
fn relay() -> RelayAt {
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let (identity, allowance) = (Identity::generate().unwrap(), Allowance::default());
    let options = RelayOptions {
        listen: local,
        forward: local,
        ports: 1,
        identity,
        token: None,
        connections: 1_000,
        places: 10,
        per_network: std::num::NonZeroU32::MIN,
        allowance,
    };
    let relay = Relay::bind(options).unwrap();
    let port = relay.address().unwrap().port();
    tokio::spawn(relay.run(std::future::pending()));
    RelayAt {
        port,
        ..Ipv4Addr::LOCALHOST.to_string().parse().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_found_by_its_paired_machines_and_admits_them() {
    let (home, inbox, source) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
    let (alice, bob, relay) = (
        Identity::generate().unwrap(),
        Identity::generate().unwrap(),
        relay(),
    );
    let [of_bob, of_alice] = paired(&alice, &bob).await;
    let home = Home::at(home.path());
    peers::add(&home, &of_alice).unwrap();
    let listen = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))];
    let admission = Admission::of_home(&home, Anyone::default()).unwrap();
    let (store, config) = (
        Arc::new(LocalStore::open(inbox.path()).unwrap()),
        Config::default(),
    );
    let (identity, observer) = (bob.clone(), haul::ignore());
    let server = Server::bind(ServerOptions {
        listen,
        identity,
        admission,
        store,
        config,
        observer,
    })
    .unwrap();
    let port = server.ports()[0].clone();
    tokio::spawn(server.run(std::future::pending(), std::future::pending()));
    let found = tokio::spawn(pair::be_found(
        port,
        Some(relay.clone()),
        vec![],
        bob.clone(),
        Config::default(),
    ));

    write(&source.path().join("f"), b"found");
    let client: Client = timeout(
        LIMIT,
        pair::connect(
            &of_bob,
            Some(relay.clone()),
            vec![],
            &alice,
            &Config::default(),
        ),
    )
    .await
    .expect("it ends")
    .unwrap();
    assert_eq!(client.key_id(), bob.key_id());
    let sent = client
        .push(
            &crate::support::to(&[&source.path().join("f")], "f"),
            haul::ignore(),
        )
        .await
        .unwrap();
    assert_eq!((sent.sent.files, sent.sent.failed), (1, 0));
    assert_eq!(std::fs::read(inbox.path().join("f")).unwrap(), b"found");
    client.close().await;

    // A forgotten machine is unknown from then on.
    assert!(peers::remove(&home, &of_alice.name).unwrap());
    let client = pair::connect(&of_bob, Some(relay), vec![], &alice, &Config::default())
        .await
        .unwrap();
    let pushed = client
        .push(
            &crate::support::to(&[&source.path().join("f")], "g"),
            haul::ignore(),
        )
        .await;
    assert!(matches!(pushed, Err(Error::NotAdmitted(_))), "{pushed:?}");
    found.abort();
}
