//! A relay over real sockets on loopback, what it gives and refuses, and relays and guests that break every rule.

#[path = "relay/abuse.rs"]
mod abuse;
#[path = "relay/datagrams.rs"]
mod datagrams;
#[path = "relay/finding.rs"]
mod finding;
#[path = "relay/rogue.rs"]
mod rogue;
#[path = "relay/stage.rs"]
mod stage;
mod support;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use haul::config::Config;
use haul::error::{Code, Error, Why};
use haul::identity::Identity;
use haul::manifest::WalkOptions;
use haul::peer::code::Credential;
use haul::peer::offer::Content;
use haul::peer::receive;
use haul::peer::rendezvous::RelayAt;
use haul::peer::route::Whereabouts;
use haul::peer::send::{Met, Offering, SendOptions};
use haul::progress::Route;
use haul::relay::{Allowance, Relay, RelayOptions};
use haul::stream::{MessageReader, StreamError};
use haul::trust::ServerTrust;
use haul::wire::{Address, BIND, Forward, Found, Message, Place, Placed, RELAY_ALPN, Refused, Seek};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, Endpoint, SendStream};
use support::LIMIT;
use tokio::net::UdpSocket;
use tokio::time::timeout;

fn local() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    timeout(LIMIT, what).await.expect("it ends")
}

fn options() -> RelayOptions {
    let (identity, allowance) = (Identity::generate().unwrap(), Allowance::default());
    RelayOptions { listen: local(), forward: local(), ports: 2, identity, token: None, places: 100, allowance }
}

/// A relay that runs, and where.
fn relay(options: RelayOptions) -> SocketAddr {
    let relay = Relay::bind(options).unwrap();
    let at = relay.address().unwrap();
    tokio::spawn(relay.run(std::future::pending()));
    at
}

fn named(at: SocketAddr) -> RelayAt {
    RelayAt { port: at.port(), ..at.ip().to_string().parse().unwrap() }
}

/// Somebody who speaks to a relay without haul.
struct Guest {
    connection: Connection,
    _endpoint: Endpoint,
}

impl Guest {
    async fn at(relay: SocketAddr) -> Self {
        let any = ServerTrust { by_code: true, ..ServerTrust::default() }.verifier("relay", relay.port()).unwrap();
        let mut tls =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(any)
                .with_no_client_auth();
        tls.alpn_protocols = vec![RELAY_ALPN.to_vec()];
        let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        let endpoint = Endpoint::client(local()).unwrap();
        let connection = within(endpoint.connect_with(config, relay, "relay").unwrap()).await.unwrap();
        Self { connection, _endpoint: endpoint }
    }

    /// Says something on a stream of its own.
    async fn say(&self, bytes: &[u8]) -> (MessageReader, SendStream) {
        let (mut send, receive) = within(self.connection.open_bi()).await.unwrap();
        send.write_all(bytes).await.unwrap();
        (MessageReader::new(receive), send)
    }

    async fn place(&self, place: &Place) -> Result<(Placed, MessageReader, SendStream), Why> {
        let (mut reader, send) = self.say(&place.to_bytes()).await;
        Ok((answer(&mut reader).await?, reader, send))
    }

    async fn seek(&self, seek: &Seek) -> Result<Found, Why> {
        let (mut reader, _send) = self.say(&seek.to_bytes()).await;
        answer(&mut reader).await
    }
}

async fn answer<M: Message>(reader: &mut MessageReader) -> Result<M, Why> {
    let frame = within(reader.frame(M::LIMIT.max(Refused::LIMIT))).await.unwrap().unwrap();
    match frame.kind {
        Refused::TYPE => Err(frame.decode::<Refused>().unwrap().why.into()),
        _ => Ok(frame.decode().unwrap()),
    }
}

fn place(claim: u8, number: Option<u32>) -> Place {
    Place { claim: [claim; 16], number, token: None, addresses: vec![] }
}

fn seek(number: u32) -> Seek {
    Seek { number, token: None, addresses: vec![], forward: true }
}

/// Two ends that the relay forwards for: their sockets, bound, and the relay's port.
async fn pair(at: SocketAddr) -> ([UdpSocket; 2], SocketAddr, [Guest; 2]) {
    let (sender, receiver) = (Guest::at(at).await, Guest::at(at).await);
    let (placed, mut reader, _send) = sender.place(&place(1, None)).await.unwrap();
    let found = receiver.seek(&seek(placed.number)).await.unwrap();
    let told: Found = answer(&mut reader).await.unwrap();
    let forwards = [told.forward.unwrap(), found.forward.unwrap()];
    let port = SocketAddr::new(at.ip(), forwards[0].port);
    assert_eq!(forwards[0].port, forwards[1].port);
    let sockets = [UdpSocket::bind(local()).await.unwrap(), UdpSocket::bind(local()).await.unwrap()];
    for (socket, Forward { token, .. }) in sockets.iter().zip(&forwards) {
        socket.send_to(&[&[BIND][..], token].concat(), port).await.unwrap();
    }
    // Until both are bound, nothing arrives.
    let [one, other] = &sockets;
    let mut buffer = [0; 2000];
    within(async {
        loop {
            one.send_to(b"hello", port).await.unwrap();
            if timeout(Duration::from_millis(100), other.recv_from(&mut buffer)).await.is_ok() {
                return;
            }
        }
    })
    .await;
    (sockets, port, [sender, receiver])
}

/// What comes next, if it comes soon: on loopback nothing is under way for long.
async fn next(socket: &UdpSocket) -> Option<(Vec<u8>, SocketAddr)> {
    let mut buffer = [0; 2000];
    let came = timeout(Duration::from_millis(300), socket.recv_from(&mut buffer)).await.ok()?.ok()?;
    Some((buffer[..came.0].to_vec(), came.1))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_forwards_between_the_two_ends_and_for_nobody_else() {
    let at = relay(options());
    let ([one, other], port, _guests) = pair(at).await;
    while next(&other).await.is_some() {}
    one.send_to(b"there", port).await.unwrap();
    assert_eq!(next(&other).await, Some((b"there".to_vec(), port)));
    other.send_to(b"back", port).await.unwrap();
    assert_eq!(next(&one).await, Some((b"back".to_vec(), port)));
    // A third machine's goes nowhere, whatever it says; each datagram has one copy at most.
    let stranger = UdpSocket::bind(local()).await.unwrap();
    for datagram in [&b"hello"[..], &[&[BIND][..], &[0; 32]].concat(), &[BIND], &[]] {
        stranger.send_to(datagram, port).await.unwrap();
    }
    assert_eq!((next(&one).await, next(&other).await, next(&stranger).await), (None, None, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_moves_with_its_token_and_only_within_its_own_address() {
    let at = relay(options());
    let (sender, receiver) = (Guest::at(at).await, Guest::at(at).await);
    let (placed, mut reader, _send) = sender.place(&place(1, None)).await.unwrap();
    let found = receiver.seek(&seek(placed.number)).await.unwrap();
    let told: Found = answer(&mut reader).await.unwrap();
    let port = SocketAddr::new(at.ip(), told.forward.as_ref().unwrap().port);
    let [ours, theirs] = [told, found].map(|found| [&[BIND][..], &found.forward.unwrap().token].concat());
    let (one, other) = (UdpSocket::bind(local()).await.unwrap(), UdpSocket::bind(local()).await.unwrap());
    one.send_to(&ours, port).await.unwrap();
    // 127.0.0.2 is not the address that QUIC has validated, so nobody can be made a target.
    let Ok(elsewhere) = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, 2), 0)).await else {
        return println!("skipped: there is no second loopback address");
    };
    elsewhere.send_to(&theirs, port).await.unwrap();
    one.send_to(b"lost", port).await.unwrap();
    assert_eq!((next(&elsewhere).await, next(&other).await), (None, None));
    other.send_to(&theirs, port).await.unwrap();
    one.send_to(b"here", port).await.unwrap();
    assert_eq!(next(&other).await.map(|(bytes, _)| bytes), Some(b"here".to_vec()));
    // Another port of the same address, as a NAT gives it anew.
    let moved = UdpSocket::bind(local()).await.unwrap();
    moved.send_to(&theirs, port).await.unwrap();
    one.send_to(b"there", port).await.unwrap();
    assert_eq!((next(&moved).await.map(|(bytes, _)| bytes), next(&other).await), (Some(b"there".to_vec()), None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_pair_may_have_ends() {
    let at = relay(RelayOptions { allowance: Allowance { bytes: 2_000, ..Allowance::default() }, ..options() });
    let ([one, other], port, _guests) = pair(at).await;
    let (mut sent, mut came) = (0, 0);
    for _ in 0..10 {
        one.send_to(&[7; 500], port).await.unwrap();
        sent += 500;
        came += next(&other).await.map_or(0, |(bytes, _)| bytes.len());
    }
    assert!((1_000..=2_500).contains(&came), "{came} of {sent}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_there_is_no_room_to_forward_the_two_are_told_of_each_other_all_the_same() {
    let at = relay(RelayOptions { allowance: Allowance { pairs: 1, ..Allowance::default() }, ..options() });
    let (sender, receiver) = (Guest::at(at).await, Guest::at(at).await);
    let (placed, _reader, _send) = sender.place(&place(1, None)).await.unwrap();
    assert!(receiver.seek(&seek(placed.number)).await.unwrap().forward.is_some());
    let second = receiver.seek(&seek(placed.number)).await.unwrap();
    assert!(second.forward.is_none() && !second.addresses.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_takes_all_the_room_to_forward() {
    let at = relay(RelayOptions { ports: 64, ..options() });
    let (sender, receiver) = (Guest::at(at).await, Guest::at(at).await);
    let (placed, mut reader, _send) = sender.place(&place(1, None)).await.unwrap();
    let mut forwarded = 0;
    while let Ok(found) = receiver.seek(&seek(placed.number)).await {
        let _: Found = answer(&mut reader).await.unwrap();
        forwarded += u32::from(found.forward.is_some());
    }
    assert_eq!(forwarded, 16, "of an address, before its tries are used up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_admits_and_nothing_else_does() {
    let at = relay(RelayOptions { token: Some("swordfish".into()), ..options() });
    let guest = Guest::at(at).await;
    let with = |token: Option<&str>| Place { token: token.map(Into::into), ..place(1, None) };
    for wrong in [None, Some(""), Some("swordfis"), Some("swordfish ")] {
        assert_eq!(guest.place(&with(wrong)).await.map(|_| ()).unwrap_err().code, Code::NotAdmitted);
        let seek = Seek { token: wrong.map(Into::into), ..seek(1000) };
        assert_eq!(guest.seek(&seek).await.unwrap_err().code, Code::NotAdmitted);
    }
    guest.place(&with(Some("swordfish"))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_is_kept_for_its_claim_and_nobody_elses() {
    let at = relay(RelayOptions { places: 2, ..options() });
    let (one, other) = (Guest::at(at).await, Guest::at(at).await);
    let (placed, mut replaced, _send) = one.place(&place(1, None)).await.unwrap();
    assert!(placed.number >= 1_000, "those of three digits are of no relay");
    let (else_, _reader, _other) = other.place(&place(2, Some(placed.number))).await.unwrap();
    assert_ne!(else_.number, placed.number);
    assert_eq!(other.place(&place(3, None)).await.map(|_| ()).unwrap_err().code, Code::Busy, "it is full");
    // Who comes again, over whatever connection, has the number again, and what came before it hears the end.
    let (again, _reader, _again) = other.place(&place(1, Some(placed.number))).await.unwrap();
    assert_eq!(again.number, placed.number);
    assert!(within(replaced.read::<Found>()).await.is_err());
    // One that is gone is nobody's.
    one.connection.close(0_u8.into(), b"");
    other.connection.close(0_u8.into(), b"");
    let third = Guest::at(at).await;
    let gone = async { while third.seek(&seek(placed.number)).await.is_ok_and(|_| true) {} };
    within(gone).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_tries_from_one_address_are_some_twenty() {
    let at = relay(options());
    let mut tried = 0;
    for _ in 0..20 {
        let guest = Guest::at(at).await;
        for number in 1_000..1_050 {
            tried += usize::from(guest.seek(&seek(number)).await.is_err_and(|why| why.code == Code::NotFound));
        }
    }
    // A minute of patience is 20 more.
    assert!((20..=60).contains(&tried), "{tried}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_breaks_the_rules_is_thrown_out_alone() {
    let at = relay(options());
    let honest = Guest::at(at).await;
    let (placed, _reader, _send) = honest.place(&place(1, None)).await.unwrap();
    let mut oversized = BytesMut::from(&[Seek::TYPE][..]);
    haul::wire::put_varint(&mut oversized, 1 << 30);
    let many = Seek { addresses: vec![Address(at); 17], ..seek(1000) }.to_bytes();
    let other = haul::wire::Working {}.to_bytes();
    for bad in [&oversized[..], &[Seek::TYPE, 1, 0xff], &[Place::TYPE, 3, 0xa1, 0, 0], &many, &other] {
        let guest = Guest::at(at).await;
        let _kept = guest.say(bad).await;
        match within(guest.connection.closed()).await {
            quinn::ConnectionError::ApplicationClosed(close) => {
                assert_eq!(close.error_code, Code::Protocol.number().into(), "{bad:?}");
            }
            other => panic!("{other:?} for {bad:?}"),
        }
    }
    // Streams that say nothing take their places, and no other's.
    let idle = Guest::at(at).await;
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(idle.say(&[Seek::TYPE]).await);
    }
    let (mut refused, _) = silent.pop().unwrap();
    assert!(matches!(within(refused.frame(64)).await, Err(StreamError::Reset(Code::Busy))));
    assert!(Guest::at(at).await.seek(&seek(placed.number)).await.is_ok());
}

fn send_options(content: Content, relay: Option<RelayAt>) -> SendOptions {
    SendOptions {
        content,
        to: None,
        walk: WalkOptions::default(),
        from: "alice".into(),
        listen: vec![local()],
        expires: Duration::from_secs(3600),
        relay,
        own: vec![],
    }
}

async fn offering(relay: Option<RelayAt>) -> Offering {
    let identity = Identity::generate().unwrap();
    let options = send_options(Content::Text("under the mat".into()), relay);
    Offering::begin(options, identity, Config::default(), haul::progress::ignore()).await.unwrap()
}

async fn meet(credential: Credential, relay: RelayAt) -> Result<receive::Met, Error> {
    let at = Whereabouts { relay: Some(relay), ..Whereabouts::default() };
    within(receive::meet(&credential, at, &Identity::generate().unwrap(), &Config::default())).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_ends_that_know_a_number_and_its_words_find_each_other() {
    let relay = named(relay(options()));
    let mut offering = offering(Some(relay.clone())).await;
    assert!(offering.has_relay() && offering.relay_failure().is_none());
    let code = offering.code().unwrap().clone();
    assert!(code.is_of_relay());
    let receiving = async {
        let met = meet((&code).into(), relay).await.unwrap();
        // The address is what the relay has told, and not the relay's.
        assert_eq!(met.route(), Route::Punched);
        assert_eq!(met.offer().text.as_deref(), Some("under the mat"));
        met.accept().await.unwrap();
    };
    let ((), met) = tokio::join!(receiving, offering.meet());
    assert!(matches!(met.unwrap(), Met::Accepted { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_relay_that_helps_a_sender_is_there_for_its_own_network() {
    let full = named(relay(RelayOptions { places: 0, ..options() }));
    let closed = named(relay(RelayOptions { token: Some("swordfish".into()), ..options() }));
    let config = Config { first_reply: Duration::from_millis(300), ..Config::default() };
    let nobody = RelayAt { port: UdpSocket::bind(local()).await.unwrap().local_addr().unwrap().port(), ..full.clone() };
    for (relay, code) in [(full, Some(Code::Busy)), (closed, Some(Code::NotAdmitted)), (nobody, None)] {
        let options = send_options(Content::Text("x".into()), Some(relay));
        let identity = Identity::generate().unwrap();
        let offering = Offering::begin(options, identity, config.clone(), haul::progress::ignore()).await.unwrap();
        assert!(!offering.code().unwrap().is_of_relay());
        match (offering.relay_failure().unwrap(), code) {
            (Error::Refused(why), Some(code)) => assert_eq!(why.code, code),
            (Error::Unreachable { why, .. }, None) => assert!(why.contains("haul relay"), "{why}"),
            other => panic!("{other:?}"),
        }
    }
}

/// What a relay of ours would never say.
#[derive(Clone)]
enum Lies {
    /// The number that it gives, and where it says that everybody is.
    Sends { number: u32, to: Vec<SocketAddr> },
    /// These bytes, to whoever seeks.
    Says(Vec<u8>),
    /// Nothing.
    Silent,
    /// It ends the connection.
    Leaves,
}

/// A relay that lies.
fn hostile(lies: Lies) -> RelayAt {
    let identity = Identity::generate().unwrap();
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(identity.chain().to_vec(), identity.private_key())
        .unwrap();
    tls.alpn_protocols = vec![RELAY_ALPN.to_vec()];
    let config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).unwrap()));
    let endpoint = Endpoint::server(config, local()).unwrap();
    let at = endpoint.local_addr().unwrap();
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let lies = lies.clone();
            tokio::spawn(async move {
                let connection = incoming.await.unwrap();
                while let Ok((mut send, receive)) = connection.accept_bi().await {
                    let mut reader = MessageReader::new(receive);
                    let Ok(Some(frame)) = reader.frame(1024).await else { continue };
                    let mut bytes = BytesMut::new();
                    match &lies {
                        Lies::Silent => {}
                        Lies::Leaves => return connection.close(7_u8.into(), b"bye"),
                        Lies::Says(said) => bytes.put_slice(said),
                        Lies::Sends { number, .. } if frame.kind == Place::TYPE => {
                            Placed { number: *number, seen: Address(at) }.put(&mut bytes);
                        }
                        Lies::Sends { to, .. } => {
                            let addresses = to.iter().copied().map(Address).collect();
                            Found { addresses, forward: None }.put(&mut bytes);
                        }
                    }
                    let _ = send.write_all(&bytes).await;
                    // Kept open, as an honest one does for a place.
                    tokio::spawn(async move {
                        let _ = send.stopped().await;
                    });
                }
            });
        }
    });
    named(at)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_puts_itself_between_has_one_guess_and_sees_nothing() {
    // Mallory offers something under the number that the relay will give to alice, and bob is sent there.
    let mut mallory = offering(None).await;
    let (number, to) = (mallory.code().unwrap().number(), mallory.addresses().to_vec());
    let relay = hostile(Lies::Sends { number, to });
    let mut alice = offering(Some(relay.clone())).await;
    let code = alice.code().unwrap().clone();
    assert_eq!(code.number(), number);
    let bob = async {
        match meet((&code).into(), relay).await.map(|_| ()) {
            Err(Error::Refused(why)) => assert_eq!(why.code, Code::NotAdmitted, "{why}"),
            other => panic!("{other:?}"),
        }
    };
    let ((), met) = tokio::join!(bob, mallory.meet());
    assert!(matches!(met.unwrap(), Met::Burnt { .. }), "mallory's guess of bob's words");
    assert_eq!(alice.code(), Some(&code), "alice was not even asked");
    tokio::select! {
        met = alice.meet() => panic!("{met:?}"),
        () = tokio::time::sleep(Duration::from_millis(100)) => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_hostile_relay_says_a_receiver_ends_with_an_error_in_time() {
    let mut oversized = BytesMut::from(&[Found::TYPE][..]);
    haul::wire::put_varint(&mut oversized, 1 << 30);
    let crowd = Found { addresses: vec![Address("127.0.0.1:9".parse().unwrap()); 18], forward: None }.to_bytes();
    let token = Forward { port: 0, token: [1; 32] };
    let nowhere =
        ["0.0.0.0:1", "224.0.0.1:1", "255.255.255.255:1", "127.0.0.1:0"].map(|at| Address(at.parse().unwrap()));
    let nowhere = Found { addresses: nowhere.to_vec(), forward: Some(token) }.to_bytes();
    let lies = [
        Lies::Silent,
        Lies::Leaves,
        Lies::Says(oversized.to_vec()),
        Lies::Says(crowd.to_vec()),
        Lies::Says(nowhere.to_vec()),
        Lies::Says(vec![Found::TYPE, 1, 0xff]),
        Lies::Says(haul::wire::Working {}.to_bytes().to_vec()),
        Lies::Sends { number: 1000, to: vec![] },
    ];
    let all = lies.map(|lies| tokio::spawn(async { meet((&code()).into(), hostile(lies)).await.map(|_| ()) }));
    for ended in all {
        let error = ended.await.unwrap().unwrap_err();
        assert!(!error.to_string().is_empty());
    }
}

fn code() -> haul::peer::code::ShortCode {
    "1000-maple-canyon-orbit".parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_cannot_make_a_sender_flood_a_third_machine() {
    let victim = UdpSocket::bind(local()).await.unwrap();
    let at = victim.local_addr().unwrap();
    let many = Found { addresses: vec![Address(at); 17], forward: None }.to_bytes();
    // A number, and then more receivers than there are, all at once.
    let mut said = Placed { number: 1000, seen: Address(at) }.to_bytes().to_vec();
    (0..500).for_each(|_| said.extend_from_slice(&many));
    let _alice = offering(Some(hostile(Lies::Says(said)))).await;
    let (mut datagrams, mut bytes) = (0_u64, 0);
    let counting = async {
        let mut buffer = [0; 2000];
        loop {
            let (length, _) = victim.recv_from(&mut buffer).await.unwrap();
            (datagrams, bytes) = (datagrams + 1, bytes + length as u64);
        }
    };
    let _ = timeout(Duration::from_secs(2), counting).await;
    assert!(datagrams > 0, "it is what a NAT is opened with");
    // 8 receivers, 8 addresses, 10 times a second; and a byte each.
    assert!(datagrams <= 2 * 8 * 8 * 10 + 8 * 8 && bytes == datagrams, "{datagrams} datagrams, {bytes} bytes");
}
