//! What a connection holds of the server: a handshake slot, then a place. Both return what they hold when dropped.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::admission_control::{Arrival, HalfOpen, Places};
use super::running::Running;
use crate::error::lock::lock;
use crate::net::amplification::Unproven;
use crate::net::share::Holder;

/// How long quinn may repeat the close of a handshake: more than three times its first probe timeout of 0.3 s (RFC 9000,
/// section 10.2).
const CLOSING_TIME: Duration = Duration::from_secs(2);

/// The handshakes that are under way, shared by the ports of a server.
#[derive(Debug, Clone, Default)]
pub(super) struct Handshakes(Arc<Mutex<HalfOpen>>);

/// One handshake, until dropped.
#[derive(Debug)]
pub(super) struct HandshakeSlot {
    handshakes: Handshakes,
    number: u64,
    evicted: CancellationToken,
    /// Limits what is sent to an address that is not validated.
    unproven: Option<Unproven>,
}

impl Handshakes {
    /// Begins a handshake; `None` if the client has to prove its address first.
    pub(super) fn begin(&self, ip: IpAddr, validated: bool) -> Option<HandshakeSlot> {
        match lock(&self.0).arrive(ip, validated) {
            Arrival::Retry => None,
            Arrival::Accepted(number, evicted) => Some(HandshakeSlot {
                handshakes: self.clone(),
                number,
                evicted,
                unproven: None,
            }),
        }
    }
}

impl HandshakeSlot {
    /// Limits what is sent to the address until the slot is dropped.
    pub(super) fn limit(mut self, unproven: Unproven) -> Self {
        self.unproven = Some(unproven);
        self
    }

    /// Keeps the limit after a handshake that has failed, because quinn still sends its close.
    pub(super) fn keep_for_close(self) {
        if self.unproven.is_some() {
            tokio::spawn(async move {
                sleep(CLOSING_TIME).await;
                drop(self);
            });
        }
    }

    /// Waits until the slot is given to another client.
    pub(super) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }
}

impl Drop for HandshakeSlot {
    fn drop(&mut self) {
        lock(&self.handshakes.0).leave(self.number);
    }
}

/// The places of a server.
#[derive(Debug, Clone)]
pub(super) struct SharedPlaces(Arc<Mutex<Places>>);

/// The place of one connection, until dropped.
#[derive(Debug)]
pub(super) struct PlaceSlot {
    places: SharedPlaces,
    number: u64,
    evicted: CancellationToken,
}

impl SharedPlaces {
    pub(super) fn new(max_connections: usize) -> Self {
        Self(Arc::new(Mutex::new(Places::new(max_connections))))
    }

    /// Takes a place for a connection whose sessions `running` counts; `None` if there is none for this holder.
    pub(super) fn take(&self, holder: Holder, running: &Arc<Running>) -> Option<PlaceSlot> {
        let (number, evicted) = lock(&self.0).take(holder, running, Instant::now())?;
        Some(PlaceSlot {
            places: self.clone(),
            number,
            evicted,
        })
    }
}

impl PlaceSlot {
    /// Waits until the place is given to another connection.
    pub(super) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }
}

impl Drop for PlaceSlot {
    fn drop(&mut self) {
        lock(&self.places.0).leave(self.number);
    }
}
