//! Floods from many addresses and networks at a relay: how much they get, and what is left for others.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};

use haul::internal::protocol::{Address, Found, Seek};
use haul::{Allowance, Code, Error};
use quinn::ConnectionError;

use crate::relay::stage::*;
use crate::support::command::private;

/// Guests of other networks: the first 24 bits differ. Loopback has 2^16 such networks.
fn address(network: u8, host: u8) -> IpAddr {
    Ipv4Addr::new(127, 9, network, host).into()
}

/// An honest sender's or receiver's, in a network without any flood.
fn honest(host: u8) -> IpAddr {
    Ipv4Addr::new(127, 1, host, 1).into()
}

/// Takes places until the relay refuses; returns them and the connection.
async fn take_places(relay: SocketAddr, from: IpAddr, tries: u8) -> (Guest, Vec<Kept>) {
    let guest = Guest::from(relay, from).await.unwrap();
    let mut kept = Vec::new();
    for claim in 0..tries {
        match guest.place(&place(claim, None)).await {
            Ok((placed, reader, writer)) => kept.push(Kept {
                number: placed.number,
                _streams: (reader, writer),
            }),
            Err(error) => assert!(matches!(error, Error::Refused(why) if why.code == Code::Busy)),
        }
    }
    (guest, kept)
}

/// A place and the stream that keeps it.
struct Kept {
    number: u32,
    _streams: (
        haul::internal::net::stream::MessageReader,
        haul::internal::net::stream::MessageWriter,
    ),
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_places_from_many_networks_locks_nobody_out() {
    let relay = Host::with(|options| options.places = 60);
    let early = Guest::from(relay.address, honest(1)).await.unwrap();
    let (first, mut told, _writer) = early.place(&place(1, None)).await.unwrap();
    let mut flood = Vec::new();
    let mut taken = 0;
    for network in 0..20 {
        let (guest, kept) = take_places(relay.address, address(network, 1), 12).await;
        taken += kept.len();
        flood.push((guest, kept));
    }
    assert!(taken + 1 >= 60, "the flood has filled it: {taken}");
    // Who comes later gets a place, and who came before has kept it.
    let seeker = Guest::from(relay.address, honest(9)).await.unwrap();
    for host in 2..8 {
        let late = Guest::from(relay.address, honest(host)).await.unwrap();
        let (placed, mut reader, _writer) = late.place(&place(host, None)).await.unwrap();
        seeker.seek(&seek(placed.number, false)).await.unwrap();
        answer::<Found>(&mut reader).await.unwrap();
    }
    seeker.seek(&seek(first.number, false)).await.unwrap();
    answer::<Found>(&mut told).await.unwrap();
    // No network of the flood has more than its share, by more than one.
    let mut lookup = 0;
    for (network, (_, kept)) in flood.iter().enumerate().take(5) {
        let seeker = Guest::from(relay.address, address(200, network as u8 + 1)).await;
        let seeker = seeker.unwrap();
        let mut found = 0;
        for place in kept {
            found += usize::from(seeker.seek(&seek(place.number, false)).await.is_ok());
        }
        assert!(found <= 60 / 21 + 2, "network {network} keeps {found}");
        lookup += found;
    }
    assert!(lookup > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_pairs_leaves_pairs_for_other_networks() {
    let relay = Host::with(|options| {
        options.ports = 64;
        options.allowance = Allowance {
            pairs: 24,
            ..Allowance::default()
        };
    });
    let owner = Guest::from(relay.address, address(100, 1)).await.unwrap();
    let (placed, mut reader, _writer) = owner.place(&place(1, None)).await.unwrap();
    // Two addresses with 16 connections each, in networks of their own: more than there are pairs.
    let mut flood = Vec::new();
    let mut taken = 0;
    for network in 0..2 {
        for _ in 0..16 {
            let guest = Guest::from(relay.address, address(network, 1))
                .await
                .unwrap();
            let found = guest.seek(&seek(placed.number, true)).await.unwrap();
            answer::<Found>(&mut reader).await.unwrap();
            taken += u32::from(found.forward.is_some());
            flood.push(guest);
        }
    }
    assert!(taken >= 24, "{taken}");
    let sender = Guest::from(relay.address, honest(1)).await.unwrap();
    let (placed, mut reader, _writer) = sender.place(&place(2, None)).await.unwrap();
    for host in 2..6 {
        let receiver = Guest::from(relay.address, honest(host)).await.unwrap();
        let found = receiver.seek(&seek(placed.number, true)).await.unwrap();
        answer::<Found>(&mut reader).await.unwrap();
        assert!(found.forward.is_some(), "host {host}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_connections_leaves_some_for_other_networks() {
    let relay = Host::with(|options| options.connections = 40);
    let mut flood = Vec::new();
    for network in 0..4 {
        for _ in 0..12 {
            flood.extend(Guest::from(relay.address, address(network, 1)).await.ok());
        }
    }
    assert!(
        flood.len() >= 40,
        "the flood has filled it: {}",
        flood.len()
    );
    let mut late = Vec::new();
    for host in 1..9 {
        let guest = Guest::from(relay.address, honest(host)).await;
        late.push(guest.expect("a fair share"));
    }
    for guest in &late {
        guest.place(&place(1, None)).await.unwrap();
    }
    let mut closed = 0;
    for guest in &flood {
        if let Some(ConnectionError::ApplicationClosed(why)) = guest.connection.close_reason() {
            assert_eq!(
                haul::internal::net::stream::code_of(why.error_code),
                Code::Busy
            );
            closed += 1;
        }
    }
    assert!(closed >= 8, "{closed} of the flood made room");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_addresses_of_one_network_share_their_tries() {
    let relay = Host::new();
    let mut tried = 0;
    for host in 1..=10 {
        let guest = Guest::from(relay.address, address(1, host)).await.unwrap();
        for number in 0..20 {
            let why = refusal(guest.seek(&seek(100_000 + number, false)).await);
            tried += u32::from(why.code == Code::NotFound);
        }
    }
    // Ten addresses alone would have 200; each further minute allows 100 more.
    assert!((100..=150).contains(&tried), "{tried}");
    let other = Guest::from(relay.address, honest(1)).await.unwrap();
    let why = refusal(other.seek(&seek(100_000, false)).await);
    assert_eq!(why.code, Code::NotFound, "others have their own");
}

/// Who guesses the number of a code learns where the relay sees the sender, and nothing of its own networks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_guesses_a_number_learns_no_private_address() {
    let relay = Host::new();
    let private = vec![Address("192.168.7.7:4433".parse().unwrap())];
    let sender = Guest::at(relay.address).await;
    let with = |number| haul::internal::protocol::Place {
        addresses: private.clone(),
        ..place(1, number)
    };
    let guesser = Guest::at(relay.address).await;
    // A code's number, as a sender of an earlier version asks for it, and that of a paired machine, which is a secret.
    for (number, expected) in [(None, 1), (Some(12_345_678), 2)] {
        let (placed, mut reader, _writer) = sender.place(&with(number)).await.unwrap();
        let seek = Seek {
            addresses: private.clone(),
            ..seek(placed.number, false)
        };
        let found = guesser.seek(&seek).await.unwrap();
        let told: Found = answer(&mut reader).await.unwrap();
        for found in [found, told] {
            assert_eq!(found.addresses.len(), expected, "{number:?}: {found:?}");
        }
    }
    // A sender of this version does not even tell the relay.
    assert!((100_000..1_000_000).contains(&Sending::by(relay.at()).await.code().number()));
}

/// A relay in a process of its own, whose memory can be measured.
struct OwnProcess {
    relay: Child,
    address: SocketAddr,
    _home: tempfile::TempDir,
}

impl OwnProcess {
    fn start() -> Self {
        use std::io::BufRead;
        let home = private();
        let mut relay = Command::new(env!("CARGO_BIN_EXE_haul"))
            .env("HAUL_HOME", home.path())
            .args(["relay", "--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = std::io::BufReader::new(relay.stdout.take().unwrap()).lines();
        let first = lines.next().unwrap().unwrap();
        let address = first.split([' ', ',']).find_map(|word| word.parse().ok());
        // The pipe must stay open and be read to its end.
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            relay,
            address: address.expect("its first line names the address"),
            _home: home,
        }
    }

    /// Resident memory in bytes.
    fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.relay.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        let kibibytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kibibytes << 10
    }
}

impl Drop for OwnProcess {
    fn drop(&mut self) {
        let _ = self.relay.kill();
        let _ = self.relay.wait();
    }
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_connection_costs_a_relay_few_kilobytes() {
    const CONNECTIONS: u64 = 1_000;
    let relay = OwnProcess::start();
    let mut idle = Vec::new();
    // What the process needs for its first connections is not theirs.
    for host in 1..=50 {
        idle.push(
            Guest::from(relay.address, address(250, host))
                .await
                .unwrap(),
        );
    }
    let before = relay.memory();
    for number in 0..CONNECTIONS {
        let [network, host] = [number / 50, number % 50 + 1].map(|part| part as u8);
        // On a busy machine a handshake may time out, which says nothing about memory.
        let guest = match Guest::from(relay.address, address(network, host)).await {
            Err(ConnectionError::TimedOut) => {
                Guest::from(relay.address, address(network, host)).await
            }
            other => other,
        };
        idle.push(guest.unwrap());
    }
    let each = relay.memory().saturating_sub(before) / CONNECTIONS;
    println!("{each} bytes for each of {CONNECTIONS} idle connections");
    assert!(each <= 48 << 10, "{each} bytes for each idle connection");
}
