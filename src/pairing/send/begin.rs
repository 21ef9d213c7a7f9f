//! Beginning an offering: prepares the content, binds the server and runs it.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::running_server::RunningServer;
use super::{Offering, SendOptions};
use crate::auth::identity::Identity;
use crate::auth::{Admission, Guests};
use crate::config::Config;
use crate::error::{Code, Error, Result};
use crate::pairing::active_code::ActiveCode;
use crate::pairing::introduction::Asking;
use crate::pairing::offer::{Content, Counting};
use crate::pairing::pair;
use crate::pairing::placement::Rendezvous;
use crate::pairing::rendezvous::RelayClient;
use crate::protocol::Offer;
use crate::server::{Server, ServerOptions};
use crate::storage::MemoryStore;
use crate::storage::walk::Follow;
use crate::transfer::events::Observer;
use crate::transfer::session::{OfferedContent, OfferedSource};

/// Connections at the same time: one receiver, and others that did not prove the code. A quarter is the most for one network,
/// and an eighth is left for the receiver that has proved it.
const MAX_CONNECTIONS: usize = 64;
/// Receivers that wait to prove that they know the code, and events that wait to be read.
const MAX_WAITING: usize = 4;

impl Offering {
    /// Begins to listen. Files are counted, not read. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Usage`] for no content, too much, or two sources of one name; [`Error::Refused`] for a source that does not
    /// exist; [`Error::Io`] when an address cannot be bound.
    pub async fn begin(
        options: SendOptions,
        identity: Identity,
        config: Config,
        observer: Observer,
    ) -> Result<Self> {
        let SendOptions {
            content,
            to,
            walk,
            from,
            listen,
            expires,
            relay,
            own,
        } = options;
        let (offer, source) = prepare(content, from, walk.follow, &identity).await?;
        let retry_for = config.retry_for;
        let config = Config {
            max_connections: MAX_CONNECTIONS,
            ..config
        };
        let guests = Arc::<Guests>::default();
        let counting = Counting::new(offer, &source, &walk);
        let pipe = match &source {
            OfferedSource::Pipe(_, pipe) => Some(pipe.clone()),
            OfferedSource::Trees(_) => None,
        };
        let (introduction_sender, introductions) = mpsc::channel(MAX_WAITING);
        let (event_sender, events) = mpsc::channel(MAX_WAITING);
        let server = Server::bind_offering(
            ServerOptions {
                listen,
                identity: identity.clone(),
                admission: Admission {
                    guests: Some(guests.clone()),
                    ..Admission::default()
                },
                store: Arc::new(MemoryStore::default()),
                config: config.clone(),
                observer: observer.clone(),
            },
            OfferedContent {
                content: source,
                walk,
                guests: guests.clone(),
                told: event_sender,
            },
            introduction_sender,
        )?;
        let server = RunningServer::spawn(server);
        let client = relay.map(|relay| RelayClient {
            port: server.port.clone(),
            relay,
            own: own.clone(),
            config,
        });
        let rendezvous = Rendezvous {
            client,
            own,
            placement: None,
        };
        let mut offering = Self {
            active: ActiveCode::new(identity, to, expires),
            rendezvous,
            server,
            counting,
            guests,
            introductions,
            asking: Asking::new(),
            events,
            observer,
            pipe,
            last_address: None,
            retry_for,
        };
        offering.renew().await?;
        Ok(offering)
    }
}

/// Makes the offer and its source. Looks at the files, in a blocking thread.
async fn prepare(
    content: Content,
    from: String,
    follow: Follow,
    identity: &Identity,
) -> Result<(Offer, OfferedSource)> {
    let server = pair::number_of_server(identity);
    tokio::task::spawn_blocking(move || content.prepare(from, follow, server))
        .await
        .map_err(|_| Error::Refused(Code::Internal.into()))?
}
