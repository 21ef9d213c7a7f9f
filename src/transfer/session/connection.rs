//! A connection to a verified peer: its memory, its sessions, and the streams that the peer opens. Both ends use it.

use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, ConnectionError};
use tokio::sync::oneshot;

use super::table::{Registration, SessionTable};
use crate::auth::identity::KeyId;
use crate::config::Config;
use crate::error::{Code, Error, Reason, Result};
use crate::net::flow_control::FlowControl;
use crate::net::memory_limit::MemoryLimit;
use crate::net::send_window::{SendMemory, SendWindow};
use crate::net::stream::{FrameRoom, MessageReader, MessageStream, StreamError, varint_of};
use crate::protocol::{Frame, Message, Plan, StreamType, Withdraw};
use crate::storage::{KeptMemory, KeptShare};
use crate::transfer::receive::Receiver;

/// The memory that the connections of one process, or the one of a client, share.
pub(crate) struct ConnectionMemory {
    receiving: Arc<MemoryLimit>,
    sending: Arc<SendMemory>,
    /// What sessions keep for their peers.
    kept: Arc<KeptMemory>,
    /// Unacknowledged bytes that one connection may keep.
    send_window: usize,
}

impl ConnectionMemory {
    /// The memory of a server.
    pub(crate) fn of_server(config: &Config) -> Self {
        Self {
            receiving: MemoryLimit::new(config.memory),
            sending: SendMemory::new(config.send_memory),
            kept: KeptMemory::new(config.session_memory),
            send_window: config.limited_send_window(),
        }
    }

    /// The memory of a client. It has one connection, so the memory for sending is its send window.
    pub(crate) fn of_client(config: &Config) -> Self {
        let send_window = config.limited_send_window();
        Self {
            receiving: MemoryLimit::new(config.memory),
            sending: SendMemory::new(send_window),
            kept: KeptMemory::whole(config.session_memory),
            send_window,
        }
    }
}

/// A connection to a peer whose key was verified.
pub(crate) struct PeerConnection {
    key_id: KeyId,
    flow_control: Arc<FlowControl>,
    kept: KeptShare,
    sessions: Arc<SessionTable>,
    /// Room for requests and plans that are not yet complete.
    frame_room: FrameRoom,
    _send_window: SendWindow,
}

/// The purpose of a stream that a client opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A session. The stream's id is its handle.
    Session,
    /// A measurement.
    Measurement,
    /// An introduction: a proof that the client knows a code.
    Introduction,
}

/// What a stream that the peer opened begins with.
enum Head {
    Starts(Purpose),
    Manifest(oneshot::Sender<MessageStream>),
    Transfer(Arc<Receiver>, Plan),
    Withdrawn(Arc<Receiver>, Withdraw),
}

impl PeerConnection {
    /// Gives a connection its share of the memory; `None` when no memory is left.
    pub(crate) fn open(
        connection: Connection,
        key_id: KeyId,
        memory: &ConnectionMemory,
    ) -> Option<Arc<Self>> {
        let flow_control = FlowControl::open(connection.clone(), key_id, &memory.receiving)?;
        let send_window = SendWindow::start(connection, &memory.sending, memory.send_window);
        Some(Arc::new(Self {
            key_id,
            flow_control,
            kept: memory.kept.share(key_id.0),
            sessions: Arc::default(),
            frame_room: FrameRoom::default(),
            _send_window: send_window,
        }))
    }

    /// The QUIC connection.
    pub(crate) fn quic(&self) -> &Connection {
        self.flow_control.connection()
    }

    /// The peer's key.
    pub(crate) fn key_id(&self) -> KeyId {
        self.key_id
    }

    /// The flow control, which bounds the memory of received data.
    pub(crate) fn flow_control(&self) -> &Arc<FlowControl> {
        &self.flow_control
    }

    /// Reads a frame of a stream that this connection's peer opened, within the room for unfinished frames.
    pub(super) async fn read_head_frame(
        &self,
        reader: &mut MessageReader,
        limit: usize,
    ) -> Result<Frame, StreamError> {
        let frame = reader.head_frame(limit, &self.frame_room).await?;
        frame.ok_or(StreamError::Ended)
    }

    /// Counts the memory of what the sessions of this connection keep.
    pub(crate) fn kept(&self) -> &KeptShare {
        &self.kept
    }

    /// Registers a session in which this end receives. A client does so before it makes the request.
    pub(super) fn register(&self, handle: u64) -> Registration {
        self.sessions.register(handle)
    }

    /// Closes the connection after a protocol error, and reports it to the peer.
    pub(crate) fn close_on_protocol_error<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(Error::Protocol(reason)) = &result {
            self.quic()
                .close(varint_of(Code::Protocol), reason.raw().as_bytes());
        }
        result
    }

    /// Accepts streams until the connection is lost, and returns the cause. The accept loop never reads: quinn yields
    /// streams by id, even those without data yet, so a separate task reads each stream. Streams that start something are
    /// passed to `started`.
    pub(crate) async fn accept_streams(
        self: &Arc<Self>,
        deadline: Duration,
        started: impl Fn(Purpose, MessageStream) + Clone + Send + 'static,
    ) -> ConnectionError {
        loop {
            match self.quic().accept_bi().await {
                Ok((send, receive)) => {
                    let connection = self.clone();
                    let started = started.clone();
                    tokio::spawn(async move {
                        let stream = MessageStream::opened_by_peer(send, receive);
                        connection.dispatch(stream, deadline, started).await;
                    });
                }
                Err(lost) => return lost,
            }
        }
    }

    /// Reads the head of a stream, and passes the stream to its session, or to `started` if it starts something.
    async fn dispatch(
        &self,
        mut stream: MessageStream,
        deadline: Duration,
        started: impl FnOnce(Purpose, MessageStream),
    ) {
        let head = self
            .flow_control
            .or_timeout_on_silence(deadline, self.read_head(&mut stream.reader))
            .await;
        match head {
            Ok(Ok(Head::Starts(purpose))) => started(purpose, stream),
            Ok(Ok(Head::Manifest(to))) => {
                stream.reader.read_in_large_pieces();
                // Fails only if the session has just ended.
                drop(to.send(stream));
            }
            Ok(Ok(Head::Transfer(receiver, plan))) => {
                receiver.incoming(plan, stream.reader, stream.writer);
            }
            Ok(Ok(Head::Withdrawn(receiver, withdraw))) => {
                receiver.withdrawn(withdraw);
                stream.writer.finish();
            }
            Ok(Err(code)) => stream.reject(code),
            Err(_) => stream.reject(Code::TimedOut),
        }
    }

    async fn read_head(&self, reader: &mut MessageReader) -> Result<Head, Code> {
        let code = |error: StreamError| Reason::from(error).code;
        let kind =
            StreamType::from_byte(reader.byte().await.map_err(code)?).ok_or(Code::Unsupported)?;
        match kind {
            StreamType::Control => return Ok(Head::Starts(Purpose::Session)),
            StreamType::Measurement => return Ok(Head::Starts(Purpose::Measurement)),
            StreamType::Introduction => return Ok(Head::Starts(Purpose::Introduction)),
            StreamType::Manifest | StreamType::Transfer => {}
        }
        let handle = reader.varint().await.map_err(code)?;
        if kind == StreamType::Manifest {
            // At a server the manifest may overtake the request, or arrive before the request is handled. If the control
            // stream was not opened earlier, it will never come.
            let may_overtake = self.quic().side().is_server() && handle < reader.id();
            return tokio::select! {
                to = self.sessions.manifest_channel(handle, may_overtake) => to.map(Head::Manifest).ok_or(Code::NotWanted),
                // The sender abandoned it, usually because the session was refused.
                () = reader.reset_by_peer(&self.frame_room) => Err(Code::NotWanted),
            };
        }
        let receiver = self.sessions.receiver(handle).ok_or(Code::NotWanted)?;
        let plan = reader.head_frame(Plan::LIMIT, &self.frame_room).await;
        let plan = plan
            .and_then(|plan| plan.ok_or(StreamError::Ended))
            .map_err(code)?;
        if plan.kind == Withdraw::TYPE {
            let withdraw = plan.decode().map_err(|bad| code(bad.into()))?;
            return Ok(Head::Withdrawn(receiver, withdraw));
        }
        let plan = plan.decode().map_err(|bad| code(bad.into()))?;
        Ok(Head::Transfer(receiver, plan))
    }
}
