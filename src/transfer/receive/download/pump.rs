//! Moves the body of a large file from its stream to the disk.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::RecvStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

use super::exchange::{WORKING_INTERVAL, send_working, while_working};
use crate::error::{Code, Reason, Result};
use crate::net::flow_control::{FlowControl, UnflushedBytes, WorkGuard};
use crate::net::stream::{MessageWriter, StreamError};
use crate::transfer::permits::Slot;
use crate::transfer::receive::body_reader::{BodyReader, RUN_SIZE};
use crate::transfer::receive::file_locks::FileLock;
use crate::transfer::receive::file_writer::FileWriter;
use crate::transfer::receive::session::Session;
use crate::transfer::receive::streams::OpenTransfer;
use crate::transfer::receive::wanted::WantedFile;

/// Bytes that are written at once, without waiting for more.
const WRITE_SIZE: usize = RUN_SIZE;
/// Longest time that fewer bytes wait for more.
const GATHER_TIME: Duration = Duration::from_millis(10);
/// A transfer that moves fewer bytes than this within [`Config::stall`](crate::config::Config::stall) is parked until
/// it has something to write.
const SLOW_TRANSFER_LIMIT: usize = 1 << 20;

/// A large transfer's lock and slot while it runs.
pub(super) struct Turn<'a> {
    pub(super) session: &'a Arc<Session>,
    pub(super) file: &'a WantedFile,
    pub(super) lock: &'a FileLock,
    pub(super) slot: Slot,
}

impl Turn<'_> {
    /// Waits, and parks the transfer when its permit is due or the wait exceeds
    /// [`Config::stall`](crate::config::Config::stall).
    pub(super) async fn wait_or_park<T>(&mut self, wait: impl Future<Output = T>) -> T {
        tokio::pin!(wait);
        tokio::select! {
            done = &mut wait => return done,
            () = self.slot.due() => {}
            () = sleep(self.session.context.config.stall) => {}
        }
        self.slot.park();
        wait.await
    }

    /// Waits for a permit if none is held.
    pub(super) async fn resume(&mut self) -> Result<(), Reason> {
        let slot = &mut self.slot;
        let resumed = async {
            slot.resume().await;
            Ok(())
        };
        self.lock.or_superseded(resumed).await
    }
}

/// A write that runs on a blocking thread. It returns the writer and the number of bytes written.
struct DiskJob {
    running: JoinHandle<(FileWriter, usize, Result<(), Reason>)>,
    _at_work: WorkGuard,
}

/// The writer of a file: it is idle, or a job has it. It is lost if the job panics.
struct Disk {
    idle: Option<FileWriter>,
    job: Option<DiskJob>,
}

impl Disk {
    /// Writes the bytes that are ready on a blocking thread, if the writer is idle.
    fn start(&mut self, body: &mut BodyReader, flow_control: &Arc<FlowControl>) {
        let Some(mut writer) = self.idle.take() else {
            return;
        };
        let (runs, bytes) = body.drain();
        let running = tokio::task::spawn_blocking(move || {
            let written = writer.write(runs);
            (writer, bytes, written)
        });
        self.job = Some(DiskJob {
            running,
            _at_work: flow_control.start_work(),
        });
    }

    /// Waits for the running job, and forever if none runs. Returns the number of bytes that left memory, and whether
    /// they were written. Cancelling loses nothing.
    async fn finished(&mut self) -> Result<(usize, Result<(), Reason>), Reason> {
        let Some(job) = &mut self.job else {
            return pending().await;
        };
        let done = (&mut job.running).await;
        self.job = None;
        let (writer, bytes, written) = done.map_err(|_| Reason::from(Code::Internal))?;
        self.idle = Some(writer);
        Ok((bytes, written))
    }
}

/// The body of a file on its way from the stream to the disk.
pub(super) struct Pump<'a, 't> {
    turn: &'a mut Turn<'t>,
    stream: &'a mut RecvStream,
    receipt: &'a mut MessageWriter,
    /// The first bytes of the body.
    begun: Bytes,
    body: BodyReader,
    credit: UnflushedBytes,
    disk: Disk,
    /// Since when bytes wait to be written.
    pending_since: Instant,
}

/// What is left after the body has ended.
pub(super) struct PumpEnd {
    pub(super) body: BodyReader,
    pub(super) credit: UnflushedBytes,
    /// `None` if a write panicked.
    pub(super) writer: Option<FileWriter>,
}

impl<'a, 't> Pump<'a, 't> {
    pub(super) fn new(
        turn: &'a mut Turn<'t>,
        body: BodyReader,
        writer: FileWriter,
        transfer: &'a mut OpenTransfer,
    ) -> Self {
        let flow_control = turn.session.context.flow_control.clone();
        Self {
            turn,
            stream: &mut transfer.stream,
            receipt: &mut transfer.receipt,
            begun: std::mem::take(&mut transfer.begun),
            body,
            credit: UnflushedBytes::new(flow_control),
            disk: Disk {
                idle: Some(writer),
                job: None,
            },
            pending_since: Instant::now(),
        }
    }

    /// Takes the bytes that arrived together with the plan.
    pub(super) fn take_begun(&mut self) -> Result<(), Reason> {
        let start = self.body.start();
        let begun = std::mem::take(&mut self.begun);
        self.credit.add(self.body.take(start, begun)?);
        Ok(())
    }

    /// Moves the body from the stream to the disk. It reads all the time. It writes when the disk is free and either
    /// enough bytes have arrived or the gathering time has passed.
    pub(super) async fn run(&mut self) -> Result<(), Reason> {
        let session = self.turn.session;
        let lock = self.turn.lock;
        let context = &session.context;
        let deadline = context.config.deadline;
        let stall = context.config.stall;
        let silence = context.flow_control.silence(deadline);
        tokio::pin!(silence);
        let mut working_sent_at = Instant::now();
        self.pending_since = Instant::now();
        // Bytes written under this permit since `counted_since`.
        let mut recent_bytes = 0;
        let mut counted_since = self.pending_since;
        let mut ended = false;
        loop {
            if self.should_write(ended) {
                if self.turn.slot.is_due() {
                    self.turn.slot.park();
                }
                while_working(session, self.receipt, self.turn.resume()).await?;
                self.disk.start(&mut self.body, &context.flow_control);
            }
            let is_idle = self.disk.job.is_none();
            if ended && is_idle {
                return Ok(());
            }
            tokio::select! {
                biased;
                () = lock.superseded() => return Err(Code::Superseded.into()),
                finished = self.disk.finished(), if !is_idle => {
                    let (bytes, written) = finished?;
                    self.credit.release(bytes);
                    // Restart the silence timer now, not at the next poll.
                    silence.set(context.flow_control.silence(deadline));
                    written?;
                    session.received(self.turn.file.id, bytes as u64);
                    recent_bytes += bytes;
                }
                read = read_ready(self.stream, &mut self.body), if !ended => {
                    let (bytes, more) = read?;
                    if self.body.pending() == bytes {
                        self.pending_since = Instant::now();
                    }
                    self.credit.add(bytes);
                    ended = !more;
                }
                () = sleep_until(self.pending_since + GATHER_TIME), if is_idle && self.body.is_ready() => {}
                () = self.turn.slot.due(), if is_idle => self.turn.slot.park(),
                () = sleep_until(counted_since + stall), if is_idle && self.turn.slot.may_write() => {
                    if recent_bytes < SLOW_TRANSFER_LIMIT {
                        self.turn.slot.park();
                    }
                    recent_bytes = 0;
                    counted_since = Instant::now();
                }
                () = &mut silence, if is_idle => return Err(StreamError::TimedOut.into()),
                () = sleep_until(working_sent_at + WORKING_INTERVAL), if !is_idle => {
                    working_sent_at = Instant::now();
                    send_working(self.receipt).await;
                }
            }
        }
    }

    /// Returns whether the bytes that wait are to be written now.
    fn should_write(&self, ended: bool) -> bool {
        let is_due = || {
            ended
                || self.body.pending() >= WRITE_SIZE
                || self.pending_since.elapsed() >= GATHER_TIME
                || self.turn.session.context.flow_control.is_short()
        };
        self.disk.idle.is_some() && self.body.is_ready() && is_due()
    }

    /// Waits until the running write has ended.
    pub(super) async fn end(mut self) -> PumpEnd {
        if let Some(job) = self.disk.job.take() {
            self.disk.idle = job.running.await.ok().map(|(writer, ..)| writer);
        }
        PumpEnd {
            body: self.body,
            credit: self.credit,
            writer: self.disk.idle,
        }
    }
}

/// Reads the available data, up to [`WRITE_SIZE`] bytes, and waits only for the first chunk. Returns the number of new
/// bytes that wait to be written, and whether the stream continues. Cancelling loses nothing.
async fn read_ready(
    stream: &mut RecvStream,
    body: &mut BodyReader,
) -> Result<(usize, bool), Reason> {
    let mut bytes = 0;
    let mut chunk = stream
        .read_chunk(usize::MAX, false)
        .await
        .map_err(StreamError::from)?;
    loop {
        match chunk {
            Some(piece) => bytes += body.take(piece.offset, piece.bytes)?,
            None => return Ok((bytes, false)),
        }
        if bytes >= WRITE_SIZE {
            return Ok((bytes, true));
        }
        chunk = tokio::select! {
            biased;
            next = stream.read_chunk(usize::MAX, false) => next.map_err(StreamError::from)?,
            () = std::future::ready(()) => return Ok((bytes, true)),
        };
    }
}
