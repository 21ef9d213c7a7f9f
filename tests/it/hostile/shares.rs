//! Peers that take more than their share of listings, sessions and log lines.

use haul::internal::net::stream::MessageReader;
use haul::internal::protocol::{Hello, List, Message, Ready, Refused};
use haul::{Code, Identity, Reason};
use quinn::SendStream;

use crate::hostile::peer::{Peer, components, within};
use crate::support::command::Serving;
use crate::support::write;

/// Files of a listing that does not fit into the windows of its client.
const FILES: usize = 2_000;

fn list() -> Vec<u8> {
    List {
        path: components(&[]),
        recursive: true,
        session: [7; 16],
    }
    .to_bytes()
    .to_vec()
}

/// Asks for a listing, and reads none of its entries. Returns why it was refused, if it was.
async fn hold_listing(peer: &Peer) -> Result<(SendStream, MessageReader), Reason> {
    let (_, control, mut answers) = peer.ask(&list()).await;
    within(answers.read::<Hello>()).await.unwrap();
    let answer = within(answers.frame(Ready::LIMIT.max(Refused::LIMIT)))
        .await
        .unwrap()
        .unwrap();
    match answer.kind {
        Refused::TYPE => Err(answer.decode::<Refused>().unwrap().why.into()),
        _ => Ok((control, answers)),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_reader_does_not_hold_the_listings_of_all() {
    let serving = Serving::start_with(&[], |served| {
        for number in 0..FILES {
            write(&served.join(format!("{number:060}")), b"");
        }
    });
    let greedy = serving.authorize();
    let another = serving.authorize();
    let mut held = Vec::new();
    let mut peers = Vec::new();
    let mut refused = 0;
    for _ in 0..4 {
        let peer = Peer::connect_to(serving.address(), serving.key_id, &greedy, |t| {
            t.stream_receive_window(4_000_u32.into());
        })
        .await;
        for _ in 0..8 {
            match hold_listing(&peer).await {
                Ok(listing) => held.push(listing),
                Err(why) => {
                    assert_eq!(why.code, Code::Busy);
                    refused += 1;
                }
            }
        }
        peers.push(peer);
    }
    assert!(held.len() >= 4 && refused > 0, "{} held", held.len());
    let another = Peer::connect_to(serving.address(), serving.key_id, &another, |_| {}).await;
    hold_listing(&another).await.expect("another key lists");
    // A listing that ends makes room.
    held.clear();
    drop(peers);
    let again = Peer::connect_to(serving.address(), serving.key_id, &greedy, |_| {}).await;
    within(async { while hold_listing(&again).await.is_err() {} }).await;
}

/// Lists an empty directory, again and again.
async fn empty_sessions(peer: &Peer, count: usize) {
    for _ in 0..count {
        let Ok((control, mut answers)) = hold_listing(peer).await else {
            continue;
        };
        while let Ok(Some(_)) = within(answers.frame(Ready::LIMIT)).await {}
        drop(control);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_sessions_fill_no_log_and_delay_no_one() {
    const SESSIONS: usize = 600;
    let serving = Serving::start(&[]);
    let hostile = Identity::generate().unwrap();
    let peer = Peer::connect_to(serving.address(), serving.key_id, &hostile, |_| {}).await;
    let one = {
        empty_sessions(&peer, 1).await;
        serving.log().len()
    };
    empty_sessions(&peer, SESSIONS).await;
    let logged = serving.log().len();
    assert!(
        logged < one * SESSIONS / 2,
        "{SESSIONS} sessions take {logged} bytes of log, and the first connection and session {one}"
    );
    // Another key is served and logged as ever.
    let another = serving.authorize();
    let quiet = Peer::connect_to(serving.address(), serving.key_id, &another, |_| {}).await;
    within(hold_listing(&quiet))
        .await
        .expect("another key is served");
    assert!(serving.log().contains(&another.key_id().to_string()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_strangers_of_one_address_take_one_line() {
    const STRANGERS: usize = 50;
    let serving = Serving::start_closed();
    for _ in 0..STRANGERS {
        let stranger = Identity::generate().unwrap();
        let peer = Peer::connect_to(serving.address(), serving.key_id, &stranger, |_| {}).await;
        peer.closed_with(Code::NotAdmitted, "a stranger").await;
    }
    let lines = serving
        .log()
        .lines()
        .filter(|line| line.contains("not admitted"))
        .count();
    assert_eq!(lines, 1);
    // The line of a key that is listed later does not depend on it.
    let listed = serving.authorize();
    let peer = Peer::connect_to(serving.address(), serving.key_id, &listed, |_| {}).await;
    within(hold_listing(&peer))
        .await
        .expect("a listed key is served");
}
