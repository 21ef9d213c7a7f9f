//! Which datagrams a relay forwards, and which it does not.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use haul::internal::protocol::{BIND, Forward};
use haul::{Allowance, Code};
use tokio::net::UdpSocket;

use crate::relay::stage::*;

/// Two ends of a pair at a relay, and their sockets, not bound yet.
struct Pair {
    relay: Host,
    guests: [Guest; 2],
    number: u32,
    forwards: [Forward; 2],
    sockets: [UdpSocket; 2],
    _place: (
        haul::internal::net::stream::MessageReader,
        haul::internal::net::stream::MessageWriter,
    ),
}

async fn socket(ip: [u8; 4]) -> UdpSocket {
    UdpSocket::bind(SocketAddr::from((Ipv4Addr::from(ip), 0)))
        .await
        .unwrap()
}

impl Pair {
    async fn at(relay: Host) -> Self {
        let guests = [
            Guest::at(relay.address).await,
            Guest::at(relay.address).await,
        ];
        let (placed, mut reader, writer) = guests[0].place(&place(1, None)).await.unwrap();
        let to_receiver = guests[1]
            .seek(&seek(placed.number, true))
            .await
            .unwrap()
            .forward
            .unwrap();
        let to_sender = answer::<haul::internal::protocol::Found>(&mut reader)
            .await
            .unwrap()
            .forward
            .unwrap();
        assert_eq!(to_sender.port, to_receiver.port);
        assert_ne!(to_sender.token, to_receiver.token);
        let sockets = [socket([127, 0, 0, 1]).await, socket([127, 0, 0, 1]).await];
        let forwards = [to_sender, to_receiver];
        Self {
            relay,
            guests,
            number: placed.number,
            forwards,
            sockets,
            _place: (reader, writer),
        }
    }

    fn port(&self) -> SocketAddr {
        SocketAddr::new(self.relay.address.ip(), self.forwards[0].port)
    }

    async fn bind(&self, end: usize, from: &UdpSocket) {
        let datagram = [&[BIND][..], &self.forwards[end].token].concat();
        from.send_to(&datagram, self.port()).await.unwrap();
    }

    async fn bound(relay: Host) -> Self {
        let pair = Self::at(relay).await;
        pair.bind(0, &pair.sockets[0]).await;
        pair.bind(1, &pair.sockets[1]).await;
        pair
    }

    async fn say(&self, from: &UdpSocket, what: &[u8]) {
        from.send_to(what, self.port()).await.unwrap();
    }
}

/// Returns the next datagram and its source. The relay handles those of a port in order, so the next one shows that
/// earlier ones had no effect.
async fn next(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut datagram = vec![0; 1 << 16];
    let (length, from) = within(socket.recv_from(&mut datagram)).await.unwrap();
    (datagram[..length].to_vec(), from)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn datagrams_from_unbound_addresses_are_not_forwarded() {
    let pair = Pair::bound(Host::new()).await;
    let [a, b] = &pair.sockets;
    let (stranger, elsewhere) = (socket([127, 0, 0, 1]).await, socket([127, 0, 0, 2]).await);
    for from in [&stranger, &elsewhere] {
        pair.say(from, b"from nobody").await;
        from.send_to(&[&[BIND][..], &[7; 32]].concat(), pair.port())
            .await
            .unwrap();
        pair.say(from, b"from nobody").await;
    }
    pair.say(a, b"from a").await;
    assert_eq!(next(b).await.0, b"from a");
    pair.say(b, b"from b").await;
    assert_eq!(next(a).await.0, b"from b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_binds_no_address_whose_ip_was_not_validated() {
    let pair = Pair::bound(Host::new()).await;
    let [a, b] = &pair.sockets;
    let elsewhere = socket([127, 0, 0, 2]).await;
    pair.bind(0, &elsewhere).await;
    pair.say(&elsewhere, b"from elsewhere").await;
    pair.say(b, b"from b").await;
    assert_eq!(next(a).await.0, b"from b", "it is still a's");
    pair.say(a, b"from a").await;
    assert_eq!(next(b).await.0, b"from a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_neighbour_with_the_token_binds_until_the_end_binds_again() {
    let pair = Pair::bound(Host::new()).await;
    let [a, b] = &pair.sockets;
    let neighbour = socket([127, 0, 0, 1]).await;
    pair.bind(0, &neighbour).await;
    pair.say(a, b"from where a was").await;
    pair.say(&neighbour, b"from a").await;
    assert_eq!(next(b).await.0, b"from a");
    pair.bind(0, a).await;
    pair.say(b, b"from b").await;
    assert_eq!(next(a).await.0, b"from b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forwarding_port_never_answers_and_drops_long_datagrams() {
    let pair = Pair::bound(Host::new()).await;
    let [a, b] = &pair.sockets;
    pair.bind(1, b).await;
    for what in [&b""[..], &[0; 1], &[BIND; 33], &[0xc0; 1_200]] {
        // Forwarded to its own end only.
        let stranger = socket([127, 0, 0, 1]).await;
        pair.say(&stranger, what).await;
    }
    pair.say(a, &[0x40; 9_000]).await;
    pair.say(a, b"from a").await;
    assert_eq!(next(b).await.0, b"from a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unvalidated_address_gets_fewer_bytes_than_it_sent() {
    let relay = Host::new();
    // A first packet of an unknown version, and a truncated one of QUIC 1: the header alone would be enough for an
    // answer.
    let unknown = [
        &[0xc0, 0x1a, 0x2a, 0x3a, 0x4a, 8][..],
        &[1; 8],
        &[8],
        &[2; 8],
        &[0; 1_200],
    ]
    .concat();
    let socket = socket([127, 0, 0, 1]).await;
    for garbage in [&unknown[..40], &[0; 1_200], &[0x40; 1_200]] {
        socket.send_to(garbage, relay.address).await.unwrap();
    }
    socket.send_to(&unknown, relay.address).await.unwrap();
    let (answer, _) = next(&socket).await;
    assert!(
        answer[1..5] == [0; 4] && answer.len() < 100,
        "the versions that it speaks, and nothing before: {answer:?}"
    );

    let nat = Tap::before(relay.address).await;
    Guest::at(nat.address).await;
    let (sent, received) = nat.first().await;
    assert_eq!(
        received[0] & 0xf0,
        0xf0,
        "a Retry (RFC 9000, section 17.2.5)"
    );
    assert!(received.len() < sent.len());
}

/// Records the first datagram of each direction.
struct Tap {
    address: SocketAddr,
    first: tokio::sync::oneshot::Receiver<(Vec<u8>, Vec<u8>)>,
    _task: tokio::task::JoinSet<()>,
}

impl Tap {
    async fn before(relay: SocketAddr) -> Self {
        let (inside, outside) = (socket([127, 0, 0, 1]).await, socket([127, 0, 0, 1]).await);
        let address = inside.local_addr().unwrap();
        let (tell, first) = tokio::sync::oneshot::channel();
        let mut task = tokio::task::JoinSet::new();
        task.spawn(async move {
            let (mut tell, mut sent, mut client) = (Some(tell), None, None);
            let (mut out, mut back) = (vec![0; 1 << 16], vec![0; 1 << 16]);
            loop {
                tokio::select! {
                    Ok((length, from)) = inside.recv_from(&mut out) => {
                        client = Some(from);
                        sent.get_or_insert_with(|| out[..length].to_vec());
                        let _ = outside.send_to(&out[..length], relay).await;
                    }
                    Ok((length, _)) = outside.recv_from(&mut back), if client.is_some() => {
                        if let (Some(tell), Some(sent)) = (tell.take(), sent.clone()) {
                            let _ = tell.send((sent, back[..length].to_vec()));
                        }
                        let _ = inside.send_to(&back[..length], client.unwrap()).await;
                    }
                }
            }
        });
        Self {
            address,
            first,
            _task: task,
        }
    }

    async fn first(self) -> (Vec<u8>, Vec<u8>) {
        within(self.first).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_ends_at_its_limits_of_bytes_and_time() {
    tokio::join!(so_many_bytes(), so_much_time());
}

async fn so_many_bytes() {
    let allowance = Allowance {
        bytes: 3_000,
        ..Allowance::default()
    };
    let pair = Pair::bound(Host::with(|options| {
        (options.ports, options.allowance) = (1, allowance)
    }))
    .await;
    let [a, b] = &pair.sockets;
    for byte in 0..10 {
        pair.say(a, &[byte; 1_000]).await;
    }
    for byte in 0..3 {
        assert_eq!(next(b).await.0, [byte; 1_000]);
    }
    // With one port the two get another pair only once this one is gone.
    let again = again(&pair).await;
    for (end, socket) in [a, b].into_iter().enumerate() {
        let token = if end == 0 {
            again.0.token
        } else {
            again.1.token
        };
        socket
            .send_to(&[&[BIND][..], &token].concat(), pair.port())
            .await
            .unwrap();
    }
    pair.say(a, b"again").await;
    assert_eq!(next(b).await.0, b"again", "nothing of what was above");
}

async fn so_much_time() {
    let allowance = Allowance {
        time: Duration::from_millis(1),
        ..Allowance::default()
    };
    let pair = Pair::bound(Host::with(|options| {
        (options.ports, options.allowance) = (1, allowance)
    }))
    .await;
    again(&pair).await;
}

/// Gets another pair for the same two as soon as possible. It takes one sweep of the relay.
async fn again(pair: &Pair) -> (Forward, Forward) {
    let (_, mut reader, _writer) = pair.guests[0]
        .place(&place(1, Some(pair.number)))
        .await
        .unwrap();
    for _ in 0..17 {
        let to_receiver = pair.guests[1]
            .seek(&seek(pair.number, true))
            .await
            .unwrap()
            .forward;
        let to_sender = answer::<haul::internal::protocol::Found>(&mut reader)
            .await
            .unwrap()
            .forward;
        if let (Some(to_sender), Some(to_receiver)) = (to_sender, to_receiver) {
            return (to_sender, to_receiver);
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    panic!("the pair does not end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_with_a_new_ip_must_connect_again() {
    let relay = Host::new();
    let guest = Guest::at(relay.address).await;
    guest
        .endpoint
        .rebind(std::net::UdpSocket::bind("127.0.0.2:0").unwrap())
        .unwrap();
    let (mut reader, _writer) = guest
        .ask(&haul::internal::protocol::Message::to_bytes(&seek(
            5_000, false,
        )))
        .await;
    let _ = within(reader.frame(4096)).await;
    let stopping = quinn::VarInt::from_u32(Code::Stopping.number());
    match within(guest.connection.closed()).await {
        quinn::ConnectionError::ApplicationClosed(close) => {
            assert_eq!(close.error_code, stopping, "{close}");
        }
        // quinn may send only three times what arrived from an address that is not validated (RFC 9000, section 8.2.1).
        // The challenge to the new address is larger, so the close may stay unsent until quinn has forgotten the
        // connection. Its endpoint then answers with a reset. A client connects again after either.
        closed => assert_eq!(closed, quinn::ConnectionError::Reset),
    }
}
