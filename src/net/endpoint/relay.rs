//! The endpoint of a relay: many idle connections, each of which needs little.

use std::sync::Arc;

use quinn::congestion::NewRenoConfig;
use rustls::server::WebPkiClientVerifier;

use super::{listening_config, server_tls, transport};
use crate::auth::identity::Identity;
use crate::config::Config;
use crate::error::Result;
use crate::protocol::RELAY_ALPN;

/// Streams that a relay's client may have open at the same time: some places, and the numbers that it seeks.
pub(crate) const RELAY_STREAMS: u8 = 16;
/// Receive window in bytes of a stream at a relay: the largest message has 1,024 bytes and a head.
const RELAY_STREAM_WINDOW: u32 = 2 << 10;
/// Bytes that a relay keeps for a client that does not acknowledge: 16 of its largest messages.
const RELAY_SEND_WINDOW: u64 = 16 << 10;

/// Configures a listening relay, which asks clients for no key. Fails as [`server_config`].
pub(crate) fn relay_server_config(
    identity: &Identity,
    config: &Config,
) -> Result<quinn::ServerConfig> {
    let mut tls = server_tls(identity, WebPkiClientVerifier::no_client_auth())?;
    tls.alpn_protocols = vec![RELAY_ALPN.to_vec()];
    // A thousand idle clients are a relay's usual state, and each permitted stream costs memory before it is opened. Its
    // messages are few and short: no path needs larger packets or a fast controller for them.
    let mut transport = transport(config)?;
    transport
        .max_concurrent_bidi_streams(RELAY_STREAMS.into())
        .stream_receive_window(RELAY_STREAM_WINDOW.into())
        .receive_window((RELAY_STREAM_WINDOW * u32::from(RELAY_STREAMS)).into())
        .send_window(RELAY_SEND_WINDOW)
        .mtu_discovery_config(None)
        .congestion_controller_factory(Arc::new(NewRenoConfig::default()));
    listening_config(tls, transport)
}
