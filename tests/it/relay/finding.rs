//! Honest ends that seek each other succeed.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};

use haul::pairing::receive;
use haul::pairing::route::Whereabouts;
use haul::pairing::send;
use haul::{Allowance, Code, Config, Error, Event, Identity, Observer, Rate, Route};
use tempfile::tempdir;

use crate::relay::stage::*;
use crate::support::listing;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_ends_find_each_other_by_number_and_connect_directly() {
    let relay = Host::new();
    let mut sending = Sending::by(relay.at()).await;
    let (code, to) = (sending.code(), tempdir().unwrap());
    assert!(sending.offering.has_relay() && code.is_of_relay());
    let receiving = async {
        let met = meet(&code, relay.at()).await.unwrap();
        assert_eq!(met.route(), Route::Punched, "where the relay sees it");
        take(met, to.path(), haul::ignore()).await
    };
    let serving = async {
        assert!(matches!(
            sending.offering.meet().await.unwrap(),
            send::Met::Accepted { .. }
        ));
        sending.offering.serve().await.unwrap()
    };
    let (received, sent) = tokio::join!(receiving, serving);
    assert_eq!(
        (received.sent.files, received.sent.failed, sent.sent.files),
        (2, 0, 2)
    );
    assert_eq!(
        listing(&to.path().join("t")),
        listing(&sending.source.path().join("t"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_addresses_are_told_to_who_knows_the_words() {
    let relay = Host::new();
    let own = vec![LOOPBACK.ip()];
    let mut sending = Sending::owning(relay.at(), Config::default(), own).await;
    let (code, to) = (sending.code(), tempdir().unwrap());
    let expected = sending.offering.addresses()[0];
    let receiving = async {
        let met = meet(&code, relay.at()).await.unwrap();
        let told = met.offer().addresses.clone().expect("addresses");
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].0, expected);
        take(met, to.path(), haul::ignore()).await
    };
    let serving = async {
        sending.offering.meet().await.unwrap();
        sending.offering.serve().await.unwrap()
    };
    let (received, _) = tokio::join!(receiving, serving);
    assert_eq!((received.sent.files, received.sent.failed), (2, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_direct_path_the_relay_forwards() {
    let relay = Host::new();
    let nat = Nat::before(relay.address).await;
    let mut sending = Sending::by(at(nat.inside)).await;
    let (code, to) = (sending.code(), tempdir().unwrap());
    let receiving = async {
        let met = meet(&code, relay.at()).await.unwrap();
        assert_eq!(met.route(), Route::Relayed);
        assert!(relay.forwards_on.contains(&met.address().port()));
        take(met, to.path(), haul::ignore()).await
    };
    let serving = async {
        assert!(matches!(
            sending.offering.meet().await.unwrap(),
            send::Met::Accepted { .. }
        ));
        let outcome = sending.offering.serve().await.unwrap();
        let (from, route) = sending.offering.route().unwrap();
        assert_eq!(route, Route::Relayed);
        assert!(relay.forwards_on.contains(&from.port()));
        outcome
    };
    let (received, sent) = tokio::join!(receiving, serving);
    assert_eq!(
        (received.sent.files, received.sent.failed, sent.sent.files),
        (2, 0, 2)
    );
    assert_eq!(
        listing(&to.path().join("t")),
        listing(&sending.source.path().join("t"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forwarded_session_moves_and_sends_nothing_twice() {
    let relay = Host::new();
    let nat = Arc::new(Nat::before(relay.address).await);
    let mut sending = Sending::by(at(nat.inside)).await;
    let (code, to) = (sending.code(), tempdir().unwrap());
    // The transfer outlasts the search for a better path, which begins after 2 s.
    let slow = Config {
        limit: Rate::from_bytes(900_000),
        ..impatient()
    };
    let routes = Arc::new(Mutex::new(Vec::new()));
    let observer: Observer = {
        let (routes, nat) = (routes.clone(), nat.clone());
        Arc::new(move |event| match event {
            Event::Routed { route, .. } => routes.lock().unwrap().push(route),
            Event::Started { .. } => nat.open(),
            _ => {}
        })
    };
    let receiving = async {
        take(
            meet_with(&code, relay.at(), &slow).await.unwrap(),
            to.path(),
            observer,
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
    let (received, _) = tokio::join!(receiving, serving);
    assert_eq!(*routes.lock().unwrap(), [Route::Relayed, Route::Punched]);
    assert_eq!((received.sent.files, received.sent.failed), (2, 0));
    assert_eq!(
        listing(&to.path().join("t")),
        listing(&sending.source.path().join("t"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_without_forwarding_capacity_is_reported() {
    let relay = Host::with(|options| {
        options.allowance = Allowance {
            pairs: 0,
            ..Allowance::default()
        }
    });
    let nat = Nat::before(relay.address).await;
    let sending = Sending::by(at(nat.inside)).await;
    let error = meet(&sending.code(), relay.at())
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(&error, Error::Unreachable { why, .. } if why.contains("no room to forward")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_with_a_token_serves_only_its_holders() {
    let relay = Host::with(|options| options.token = Some("open sesame".into()));
    let with = |token: Option<&str>| haul::pairing::rendezvous::RelayAt {
        token: token.map(Into::into),
        ..relay.at()
    };
    for token in [None, Some("open"), Some("")] {
        let sending = Sending::by(with(token)).await;
        assert!(!sending.offering.has_relay());
        let Some(Error::Refused(why)) = sending.offering.relay_failure() else {
            panic!("{token:?}")
        };
        assert_eq!(why.code, Code::NotAdmitted);
        assert!(
            !sending.code().is_of_relay(),
            "it can still be found nearby"
        );
    }
    let mut sending = Sending::by(with(Some("open sesame"))).await;
    let code = sending.code();
    for token in [None, Some("open sesame ")] {
        assert_eq!(
            refusal(meet(&code, with(token)).await).code,
            Code::NotAdmitted
        );
    }
    let receiving = async {
        meet(&code, with(Some("open sesame")))
            .await
            .unwrap()
            .decline()
            .await
    };
    let ((), met) = tokio::join!(receiving, sending.offering.meet());
    assert!(matches!(met.unwrap(), send::Met::Declined { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unused_number_is_answered_with_not_found() {
    let relay = Host::new();
    // Checked in the message, since a receiver asks again for 12 s: its sender may be reconnecting.
    let why = refusal(
        Guest::at(relay.address)
            .await
            .seek(&seek(5_555, true))
            .await,
    );
    assert_eq!(why.code, Code::NotFound);
    assert!(
        why.to_string().contains("no sender has this number"),
        "{why}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_keeps_its_number_over_a_restart_of_the_relay() {
    let mut relay = Host::new();
    let mut sending = Sending::by(relay.at()).await;
    let code = sending.code();
    relay.stop().await;
    let (address, identity) = (relay.address, relay.identity.clone());
    // Its port is free once quinn's own task has ended too.
    let again = within(async {
        loop {
            match Host::try_with(|options| {
                (options.listen, options.identity) = (address, identity.clone())
            }) {
                Ok(again) => return again,
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
            }
        }
    })
    .await;
    let receiving = async { meet(&code, again.at()).await.unwrap().decline().await };
    let ((), met) = tokio::join!(receiving, sending.offering.meet());
    assert!(matches!(met.unwrap(), send::Met::Declined { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_relay_does_not_hide_a_local_sender() {
    let mut sending = Sending::of(
        at(NOWHERE),
        Config {
            first_reply: std::time::Duration::from_secs(1),
            ..impatient()
        },
    )
    .await;
    assert!(!sending.offering.has_relay() && sending.offering.relay_failure().is_some());
    let (code, addresses) = (sending.code(), sending.offering.addresses().to_vec());
    let at = Whereabouts {
        addresses,
        relay: Some(at(NOWHERE)),
        own: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
    };
    let identity = Identity::generate().unwrap();
    let receiving = async {
        within(receive::meet(&(&code).into(), at, &identity, &impatient()))
            .await
            .unwrap()
            .decline()
            .await
    };
    let ((), met) = tokio::join!(receiving, sending.offering.meet());
    assert!(matches!(met.unwrap(), send::Met::Declined { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_wrong_word_over_a_relay_burns_the_code_too() {
    let relay = Host::new();
    let mut sending = Sending::by(relay.at()).await;
    let code = sending.code();
    let guess = wrong(&code);
    let (guessed, met) = tokio::join!(meet(&guess, relay.at()), sending.offering.meet());
    assert_eq!(refusal(guessed).code, Code::NotAdmitted);
    assert!(matches!(met.unwrap(), send::Met::Burnt { .. }));
    tokio::select! {
        late = meet(&code, relay.at()) => assert_eq!(refusal(late).code, Code::NotFound),
        met = sending.offering.meet() => panic!("{met:?}"),
    }
    sending.offering.renew().await.unwrap();
    assert_ne!(sending.code().number(), code.number());
}
