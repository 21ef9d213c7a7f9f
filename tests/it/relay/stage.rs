//! A relay, honest and raw clients for it, and a NAT.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use haul::internal::net::stream::{MessageReader, MessageWriter};
use haul::internal::protocol::{Address, Found, Message, Place, Placed, RELAY_ALPN, Refused, Seek};
use haul::pairing::code::ShortCode;
use haul::pairing::offer::Content;
use haul::pairing::receive;
use haul::pairing::receive::Met;
use haul::pairing::rendezvous::RelayAt;
use haul::pairing::route::Whereabouts;
use haul::pairing::send::{Offering, SendOptions};
use haul::{
    Allowance, Config, Error, Identity, Observer, Outcome, PullOptions, Reason, Relay,
    RelayOptions, Result, WalkOptions,
};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, ConnectionError, Endpoint};
use tempfile::{TempDir, tempdir};
use tokio::net::UdpSocket;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use crate::support::{LIMIT, content, write};

pub(crate) const LOOPBACK: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// An address at which nothing listens, so that no test searches the network of the user who runs it.
pub(crate) const NOWHERE: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9);

/// Waits for an event that must happen; a test that hangs has failed.
pub(crate) async fn within<T>(what: impl Future<Output = T>) -> T {
    timeout(LIMIT, what).await.expect("it hangs")
}

/// A relay on free ports.
pub(crate) struct Host {
    pub address: SocketAddr,
    pub forwards_on: Vec<u16>,
    pub identity: Identity,
    stop: Option<oneshot::Sender<()>>,
    running: Option<JoinHandle<()>>,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut RelayOptions)) -> Self {
        Self::try_with(change).unwrap()
    }

    pub(crate) fn try_with(change: impl FnOnce(&mut RelayOptions)) -> Result<Self> {
        let identity = Identity::generate().unwrap();
        let mut options = RelayOptions {
            listen: LOOPBACK,
            forward: LOOPBACK,
            ports: 2,
            identity: identity.clone(),
            token: None,
            connections: 1_000,
            places: 100,
            per_network: std::num::NonZeroU32::MIN,
            allowance: Allowance::default(),
        };
        change(&mut options);
        let relay = Relay::bind(options)?;
        let (address, forwards_on) = (relay.address().unwrap(), relay.forwarding_ports().to_vec());
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(relay.run(async { drop(stopped.await) }));
        Ok(Self {
            address,
            forwards_on,
            identity,
            stop: Some(stop),
            running: Some(running),
        })
    }

    pub(crate) fn at(&self) -> RelayAt {
        at(self.address)
    }

    pub(crate) async fn stop(&mut self) {
        self.stop = None;
        within(self.running.take().unwrap()).await.unwrap();
        // quinn holds the port while a task has any connection of it, which may be a moment longer.
        within(async {
            while std::net::UdpSocket::bind(self.address).is_err() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
}

pub(crate) fn at(address: SocketAddr) -> RelayAt {
    RelayAt {
        host: address.ip().to_string(),
        port: address.port(),
        token: None,
        pin: None,
    }
}

/// Files to send: a small one and a large one.
pub(crate) struct Sending {
    pub source: TempDir,
    pub offering: Offering,
}

impl Sending {
    pub(crate) async fn by(relay: RelayAt) -> Self {
        Self::of(relay, Config::default()).await
    }

    pub(crate) async fn of(relay: RelayAt, config: Config) -> Self {
        Self::owning(relay, config, Vec::new()).await
    }

    /// A sender that has these addresses.
    pub(crate) async fn owning(relay: RelayAt, config: Config, own: Vec<std::net::IpAddr>) -> Self {
        let source = tempdir().unwrap();
        write(&source.path().join("t/small"), &content(1, 10_000));
        write(&source.path().join("t/below/large"), &content(2, 3 << 20));
        let options = SendOptions {
            content: Content::Files(vec![source.path().join("t")]),
            to: None,
            walk: WalkOptions::default(),
            from: "alice".into(),
            listen: vec![LOOPBACK],
            expires: Duration::from_secs(3600),
            relay: Some(relay),
            own,
        };
        let identity = Identity::generate().unwrap();
        let offering = within(Offering::begin(options, identity, config, haul::ignore()))
            .await
            .unwrap();
        Self { source, offering }
    }

    pub(crate) fn code(&self) -> ShortCode {
        self.offering.code().unwrap().clone()
    }
}

/// A configuration that soon gives up the search for a direct path; nothing that should work takes this long.
pub(crate) fn impatient() -> Config {
    Config {
        handshake: Duration::from_secs(2),
        ..Config::default()
    }
}

pub(crate) async fn meet(code: &ShortCode, relay: RelayAt) -> Result<Met> {
    meet_with(code, relay, &impatient()).await
}

pub(crate) async fn meet_with(code: &ShortCode, relay: RelayAt, config: &Config) -> Result<Met> {
    let at = Whereabouts {
        addresses: vec![NOWHERE],
        relay: Some(relay),
        own: Vec::new(),
    };
    within(receive::meet(
        &code.into(),
        at,
        &Identity::generate().unwrap(),
        config,
    ))
    .await
}

pub(crate) async fn take(met: Met, to: &Path, observer: Observer) -> Outcome {
    let options = PullOptions {
        sources: met.names().to_vec(),
        destination: to.to_owned(),
        into: true,
        literal: true,
        ..PullOptions::default()
    };
    let client = within(met.accept()).await.unwrap().unwrap();
    let outcome = within(client.pull(&options, observer)).await.unwrap();
    client.close_after_server().await;
    outcome
}

/// Another code of the same number.
pub(crate) fn wrong(code: &ShortCode) -> ShortCode {
    let text = code.to_string();
    let (most, last) = text.rsplit_once('-').unwrap();
    format!("{most}-{}", if last == "zoo" { "zone" } else { "zoo" })
        .parse()
        .unwrap()
}

pub(crate) fn refusal<T>(result: Result<T>) -> Reason {
    match result.map(|_| ()) {
        Err(Error::Refused(why)) => why,
        other => panic!("{other:?}"),
    }
}

/// A guest that speaks with a relay in raw quinn.
pub(crate) struct Guest {
    pub endpoint: Endpoint,
    pub connection: Connection,
}

impl Guest {
    pub(crate) async fn at(relay: SocketAddr) -> Self {
        Self::try_at(relay).await.unwrap()
    }

    pub(crate) async fn try_at(relay: SocketAddr) -> Result<Self, ConnectionError> {
        Self::from(relay, LOOPBACK.ip()).await
    }

    /// Connects from one of the addresses of loopback, 127.0.0.0/8.
    pub(crate) async fn from(
        relay: SocketAddr,
        from: std::net::IpAddr,
    ) -> Result<Self, ConnectionError> {
        let from = SocketAddr::new(from, 0);
        let endpoint = haul::internal::net::endpoint::bind(from, None).unwrap();
        let verifier = haul::internal::auth::trust::trust_any_key(None)
            .verifier("127.0.0.1", 1)
            .unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        tls.alpn_protocols = vec![RELAY_ALPN.to_vec()];
        let mut config =
            quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        // As the holder of a place does: the relay forgets clients that are silent.
        let mut transport = quinn::TransportConfig::default();
        transport.keep_alive_interval(Some(Duration::from_secs(5)));
        config.transport_config(Arc::new(transport));
        let connecting = endpoint.connect_with(config, relay, "127.0.0.1").unwrap();
        let connection = within(connecting).await?;
        Ok(Self {
            endpoint,
            connection,
        })
    }

    pub(crate) async fn ask(&self, bytes: &[u8]) -> (MessageReader, MessageWriter) {
        let (mut send, receive) = within(self.connection.open_bi()).await.unwrap();
        // The relay may have closed already.
        let _ = within(send.write_all(bytes)).await;
        (MessageReader::new(receive), MessageWriter::new(send))
    }

    /// Returns the answer, and the stream, which keeps a place.
    pub(crate) async fn place(
        &self,
        place: &Place,
    ) -> Result<(Placed, MessageReader, MessageWriter)> {
        let (mut reader, writer) = self.ask(&place.to_bytes()).await;
        Ok((answer(&mut reader).await?, reader, writer))
    }

    pub(crate) async fn seek(&self, seek: &Seek) -> Result<Found> {
        let (mut reader, _writer) = self.ask(&seek.to_bytes()).await;
        answer(&mut reader).await
    }
}

pub(crate) async fn answer<M: Message>(reader: &mut MessageReader) -> Result<M> {
    let frame = within(reader.frame(4096)).await?.expect("an answer");
    if frame.kind == Refused::TYPE {
        return Err(Error::Refused(
            frame.decode::<Refused>().unwrap().why.into(),
        ));
    }
    Ok(frame.decode().unwrap())
}

pub(crate) fn place(claim: u8, number: Option<u32>) -> Place {
    Place {
        claim: [claim; 16],
        number,
        token: None,
        addresses: Vec::new(),
    }
}

pub(crate) fn seek(number: u32, forward: bool) -> Seek {
    Seek {
        number,
        token: None,
        addresses: Vec::new(),
        forward,
    }
}

pub(crate) fn addresses(found: &Found) -> Vec<SocketAddr> {
    found
        .addresses
        .iter()
        .map(|Address(address)| *address)
        .collect()
}

/// A NAT in front of one machine, which takes it for the relay. It lets in only the relay until it is opened; then it
/// lets in everything, as a full-cone NAT does.
pub(crate) struct Nat {
    /// The address that the machine takes for the relay.
    pub inside: SocketAddr,
    open: Arc<AtomicBool>,
    _task: JoinSet<()>,
}

impl Nat {
    pub(crate) async fn before(relay: SocketAddr) -> Self {
        let socket = async || Arc::new(UdpSocket::bind(LOOPBACK).await.unwrap());
        let (inside, outside, open) = (
            socket().await,
            socket().await,
            Arc::new(AtomicBool::new(false)),
        );
        let address = inside.local_addr().unwrap();
        let mut task = JoinSet::new();
        task.spawn(translate(relay, inside, outside, open.clone()));
        Self {
            inside: address,
            open,
            _task: task,
        }
    }

    pub(crate) fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
    }
}

async fn translate(
    relay: SocketAddr,
    inside: Arc<UdpSocket>,
    outside: Arc<UdpSocket>,
    open: Arc<AtomicBool>,
) {
    let mut others: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let (mut machine, mut out, mut back) = (None, vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut replies = JoinSet::new();
    loop {
        tokio::select! {
            Ok((length, from)) = inside.recv_from(&mut out) => {
                machine = Some(from);
                let _ = outside.send_to(&out[..length], relay).await;
            }
            Ok((length, from)) = outside.recv_from(&mut back) => {
                let Some(machine) = machine else { continue };
                if from == relay {
                    let _ = inside.send_to(&back[..length], machine).await;
                    continue;
                }
                if !open.load(Ordering::SeqCst) {
                    continue;
                }
                let socket = match others.entry(from) {
                    Entry::Occupied(there) => there.into_mut(),
                    Entry::Vacant(new) => {
                        let socket = Arc::new(UdpSocket::bind(LOOPBACK).await.unwrap());
                        let (inner, outer) = (socket.clone(), outside.clone());
                        replies.spawn(async move {
                            let mut datagram = vec![0; 1 << 16];
                            while let Ok((length, _)) = inner.recv_from(&mut datagram).await {
                                let _ = outer.send_to(&datagram[..length], from).await;
                            }
                        });
                        new.insert(socket)
                    }
                };
                let _ = socket.send_to(&back[..length], machine).await;
            }
        }
    }
}
