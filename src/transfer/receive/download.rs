//! Receives one transfer: a small file through memory, a large one directly to its offsets.

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{Instrument, debug};

use super::body_reader::{BodyReader, RUN_SIZE, Run};
use super::file_writer::FileWriter;
use super::partial::open_partial;
use super::plan_check::kept_ranges;
use super::tasks::{blocking, lock};
use super::{FileLock, IncomingTransfer, Receiver, WantedFile};
use crate::error::{Code, Reason, Result};
use crate::net::flow_control::{Reservation, UnflushedBytes, WorkGuard};
use crate::net::stream::{MessageWriter, StreamError, varint_of};
use crate::protocol::Verdict;
use crate::protocol::{
    Committed, ENCODING_RANGES, Failed, Held, Kind, Message, Plan, Range, Trailer, Working,
    content_hasher,
};
use crate::storage::Upload;
use crate::storage::io_errors::fault;

/// Bytes that are written at once, without waiting for more.
const WRITE_SIZE: usize = RUN_SIZE;
/// Longest time that fewer bytes wait for more.
const GATHER_TIME: Duration = Duration::from_millis(10);
/// A transfer that moves fewer bytes than this within [`Config::stall`](crate::config::Config::stall) returns its
/// permit and queues for another one. A slow sender thus cannot block other transfers.
const SLOW_TRANSFER_LIMIT: usize = 1 << 20;
/// Interval of `Working` messages during long disk work.
const WORKING_INTERVAL: Duration = Duration::from_secs(5);

impl Receiver {
    /// Receives a whole file into reserved memory, then writes it under a permit.
    pub(super) async fn receive_small(
        self: Arc<Self>,
        file: WantedFile,
        stream: oneshot::Receiver<Result<IncomingTransfer, Reason>>,
        memory: Reservation,
    ) {
        let span =
            tracing::debug_span!("transfer", id = file.id, path = %file.path, size = file.size);
        async {
            self.started(&file, 0);
            let Some(incoming) = self.stream_of(&file, stream, pending()).await else {
                return;
            };
            let IncomingTransfer {
                plan,
                stream,
                mut receipt,
            } = incoming;
            let (mut stream, begun, _) = stream.into_parts();
            let result = match self.small_body(&file, &plan, &mut stream, &begun).await {
                Ok((body, trailer)) => {
                    self.moved(file.id, body.len() as u64);
                    let small = SmallBody {
                        plan,
                        body,
                        trailer,
                    };
                    self.working(&mut receipt, self.commit_small(&file, small))
                        .await
                        .map(|()| file.known_size())
                }
                Err(why) => Err(why),
            };
            drop(memory);
            self.give_receipt(&file, stream, receipt, result).await;
        }
        .instrument(span)
        .await;
    }

    async fn small_body(
        &self,
        file: &WantedFile,
        plan: &Plan,
        stream: &mut quinn::RecvStream,
        begun: &[u8],
    ) -> Result<(BytesMut, Trailer), Reason> {
        if plan.encoding != ENCODING_RANGES {
            return Err(Reason::new(
                Code::Unsupported,
                format!("encoding {} is not supported", plan.encoding),
            ));
        }
        // The receiver offered no held ranges for it.
        kept_ranges(plan, &[], file.known_size())?;
        let size: u64 = plan.ranges.iter().map(|range| range.length).sum();
        let mut content = BytesMut::with_capacity(size as usize + Trailer::LIMIT);
        content.extend_from_slice(begun);
        loop {
            if content.len() > size as usize + Trailer::LIMIT {
                return Err(Reason::new(
                    Code::Protocol,
                    "the stream continues after its trailer",
                ));
            }
            let chunk = self
                .or_timeout_on_silence(stream.read_chunk(WRITE_SIZE, true))
                .await?;
            match chunk.map_err(StreamError::from)? {
                Some(chunk) => content.extend_from_slice(&chunk.bytes),
                None => break,
            }
        }
        if content.len() < size as usize {
            return Err(Reason::new(Code::Protocol, "the body ended too early"));
        }
        let mut tail = content.split_off(size as usize);
        let bad = |e: crate::protocol::Malformed| Reason::new(Code::Protocol, e.to_string());
        match crate::protocol::Frame::take(&mut tail, Trailer::LIMIT).map_err(bad)? {
            Some(frame) if tail.is_empty() => Ok((content, frame.decode().map_err(bad)?)),
            _ => Err(Reason::new(
                Code::Protocol,
                "the body is not followed by its trailer alone",
            )),
        }
    }

    async fn commit_small(
        self: &Arc<Self>,
        file: &WantedFile,
        small: SmallBody,
    ) -> Result<(), Reason> {
        let claim = self.claim(file).await?;
        if self.is_committed_by_other(file, &claim).await? {
            return Ok(());
        }
        let permit = claim.or_superseded(self.session.permits.acquire()).await?;
        let store = self.session.store.clone();
        let path = file.path.clone();
        let attributes = file.attributes.clone();
        let source = file.claim.clone();
        let durability = self.session.durability;
        let receiver = self.clone();
        let committed = self.committed_source(file);
        blocking(move || {
            // The claim and the permit are held until the disk work ends, even if the caller is cancelled.
            let _permit = permit;
            let mut hasher = content_hasher(source.size, small.plan.holes());
            if hasher.update(&small.body).finalize() != small.trailer.digest {
                return Err(Reason::new(
                    Code::Corrupt,
                    "the content does not match its digest; send it again",
                ));
            }
            receiver.clear_path_above(&path)?;
            let mut upload = open_partial(&*store, &path, &source)?;
            if let Err(error) = write_small(&mut *upload, &small.plan, &small.body) {
                upload.discard();
                return Err(fault(&path, "write it", error));
            }
            if let Err(why) = receiver.make_room(&path, Kind::File) {
                upload.discard();
                return Err(why);
            }
            receiver.warn(&path, upload.commit(&attributes, durability)?);
            claim.committed(committed);
            Ok(())
        })
        .await
    }

    /// Receives a large file with a permit in hand: opens the partial, offers the ranges it holds, and receives the
    /// rest.
    pub(super) async fn receive_large(
        self: Arc<Self>,
        file: WantedFile,
        permit: OwnedSemaphorePermit,
        claim: FileLock,
    ) {
        let span =
            tracing::debug_span!("transfer", id = file.id, path = %file.path, size = file.size);
        async {
            if self.copy_existing_content(&file, &claim).await {
                claim.committed(self.committed_source(&file));
                drop((permit, claim));
                self.settled(&file, Ok(file.known_size()));
                return self.answer(Verdict::Done(file.id));
            }
            let store = self.session.store.clone();
            let path = file.path.clone();
            let source = file.claim.clone();
            let receiver = self.clone();
            let begin = move || {
                receiver.clear_path_above(&path)?;
                let (mut disk, held) =
                    FileWriter::begin(open_partial(&*store, &path, &source)?, &path, source.size)?;
                disk.write_back_for(receiver.session.durability);
                Ok((disk, held))
            };
            let begun = blocking(begin).await;
            let (disk, held) = match begun {
                Ok(begun) => begun,
                Err(why) => return self.refuse(&file, why),
            };
            self.started(&file, held.iter().map(|h| h.range.length).sum());
            let stream = self.admit(file.id);
            claim.asked();
            self.answer(Verdict::Want(file.id, held.clone()));
            let mut slot = LargeDownload {
                receiver: &self,
                permit: Some(permit),
                claim: &claim,
            };
            // A peer that never opens the stream must not hold the permit for long.
            let Some(incoming) = slot
                .wait_releasing_permit(self.stream_of(&file, stream, claim.superseded()))
                .await
            else {
                return;
            };
            let IncomingTransfer {
                plan,
                stream,
                mut receipt,
            } = incoming;
            let (mut stream, rest, start) = stream.into_parts();
            let body = BodyReader::new(&plan, start, file.size, disk.in_order());
            let result = slot
                .receive(
                    &file,
                    disk,
                    body,
                    (&plan, &held),
                    (&mut stream, rest),
                    &mut receipt,
                )
                .await;
            drop(slot);
            // The disk work has ended, and a newer session need not wait until this peer reads the receipt.
            drop(claim);
            self.give_receipt(&file, stream, receipt, result).await;
        }
        .instrument(span)
        .await;
    }

    /// Waits for the peer, or fails if the connection is silent until the deadline.
    async fn or_timeout_on_silence<T>(
        &self,
        wait: impl Future<Output = T>,
    ) -> Result<T, StreamError> {
        self.session
            .window
            .or_timeout_on_silence(self.session.config.deadline, wait)
            .await
    }

    /// Runs disk work, or waits for a permit, and sends `Working` messages on the receipt stream meanwhile.
    async fn working<T>(
        &self,
        receipt: &mut MessageWriter,
        work: impl Future<Output = Result<T, Reason>>,
    ) -> Result<T, Reason> {
        let _at_work = self.session.window.start_work();
        tokio::pin!(work);
        loop {
            match timeout(WORKING_INTERVAL, &mut work).await {
                Ok(done) => return done,
                // A peer that does not read this will not read the receipt either. The work continues.
                Err(_) => drop(timeout(WORKING_INTERVAL, receipt.write(&Working {})).await),
            }
        }
    }

    /// Waits for the stream of a wanted file. A newer connection of the session ends the wait.
    async fn stream_of(
        &self,
        file: &WantedFile,
        stream: oneshot::Receiver<Result<IncomingTransfer, Reason>>,
        superseded: impl Future<Output = ()>,
    ) -> Option<IncomingTransfer> {
        let failure = tokio::select! {
            () = superseded => Reason::from(Code::Superseded),
            incoming = self.or_timeout_on_silence(stream) => match incoming {
                Ok(Ok(Ok(incoming))) => return Some(incoming),
                Ok(Ok(Err(withdrawn))) => withdrawn,
                _ => Reason::new(Code::TimedOut, "the sender did not send the file in time; send it again"),
            },
            lost = self.session.window.connection().closed() => StreamError::from(lost).into(),
        };
        lock(&self.admitted).remove(&file.id);
        self.settled(file, Err(failure));
        None
    }

    /// Writes the receipt and finishes the stream. Only then does it stop a failed sender, so that the sender can read
    /// why.
    async fn give_receipt(
        &self,
        file: &WantedFile,
        mut stream: quinn::RecvStream,
        mut receipt: MessageWriter,
        result: Result<u64, Reason>,
    ) {
        let sent = match &result {
            Ok(bytes) => {
                // The sender may announce hard links to it as soon as it has the receipt.
                self.stands(file.id, file.hard_link, &file.path);
                let bytes = *bytes;
                let durability = self.session.durability;
                timeout(
                    self.session.config.deadline,
                    receipt.write(&Committed { bytes, durability }),
                )
                .await
            }
            Err(why) => {
                debug!(%why, "transfer failed");
                timeout(
                    self.session.config.deadline,
                    receipt.write(&Failed {
                        why: why.clone().into(),
                    }),
                )
                .await
            }
        };
        if matches!(sent, Ok(Ok(()))) {
            let delivered = receipt.delivered();
            receipt.finish();
            self.receipts.spawn(delivered);
        }
        if let Err(why) = &result {
            // Fails only if the stream has ended.
            let _ = stream.stop(varint_of(why.code));
        }
        self.settled(file, result);
    }
}

/// A received small file that is not yet written.
struct SmallBody {
    plan: Plan,
    /// The bytes of the plan's ranges in order.
    body: BytesMut,
    trailer: Trailer,
}

/// A large transfer's permit and claim while it runs.
struct LargeDownload<'a> {
    receiver: &'a Arc<Receiver>,
    /// `None` while the transfer makes no progress.
    permit: Option<OwnedSemaphorePermit>,
    claim: &'a FileLock,
}

/// A write that runs on a blocking thread. It returns the writer and the number of bytes written.
struct DiskJob {
    running: JoinHandle<(FileWriter, usize, Result<(), Reason>)>,
    _at_work: WorkGuard,
}

impl LargeDownload<'_> {
    /// Waits, and returns the permit if the wait exceeds [`Config::stall`](crate::config::Config::stall).
    async fn wait_releasing_permit<T>(&mut self, wait: impl Future<Output = T>) -> T {
        tokio::pin!(wait);
        match timeout(self.receiver.session.config.stall, &mut wait).await {
            Ok(done) => done,
            Err(_) => {
                self.permit = None;
                wait.await
            }
        }
    }

    /// Receives the body and trailer, and commits. The partial stays for resume unless it is useless.
    async fn receive(
        &mut self,
        file: &WantedFile,
        mut disk: FileWriter,
        body: Result<BodyReader, Reason>,
        (plan, held): (&Plan, &[Held]),
        (stream, rest): (&mut quinn::RecvStream, Bytes),
        receipt: &mut MessageWriter,
    ) -> Result<u64, Reason> {
        let mut body = body?;
        let planned = plan.clone();
        let offered = held.to_vec();
        // The caller holds the claim and permit beyond this call, and it cannot be cancelled otherwise.
        let keep = blocking(move || disk.keep(&planned, &offered).map(|()| disk));
        let disk = self.receiver.working(receipt, keep).await?;
        let mut credit = UnflushedBytes::new(self.receiver.session.window.clone());
        credit.add(body.take(body.start(), rest)?);

        let mut idle = Some(disk);
        let mut job: Option<DiskJob> = None;
        let moved = self
            .pump(
                file,
                stream,
                &mut body,
                &mut credit,
                (&mut idle, &mut job),
                receipt,
            )
            .await;
        // The disk work must end before the claim and permit pass to another transfer.
        if let Some(job) = job {
            idle = job.running.await.ok().map(|(disk, ..)| disk);
        }
        let result: Result<_, Reason> = async {
            moved?;
            let trailer = body.trailer()?;
            let disk = idle.take().ok_or_else(|| Reason::from(Code::Internal))?;
            self.receiver.working(receipt, self.permit()).await?;
            let attributes = file.attributes.clone();
            let durability = self.receiver.session.durability;
            let receiver = self.receiver.clone();
            let path = file.path.clone();
            let finish = move || {
                let file = disk.verify(trailer)?;
                receiver.make_room(&path, Kind::File)?;
                let warnings = file.upload.commit(&attributes, durability)?;
                Ok((file.size, warnings))
            };
            let done = self.receiver.working(receipt, blocking(finish)).await;
            let (size, warnings) = done?;
            let committed = self.receiver.committed_source(file);
            self.claim.committed(committed);
            self.receiver.warn(&file.path, warnings);
            self.receiver.remember(file, plan, trailer).await;
            Ok(size)
        }
        .await;
        if let Err(why) = &result
            && let Some(disk) = idle
            && (file.size.is_none()
                || matches!(
                    why.code,
                    Code::Changed | Code::Vanished | Code::Corrupt | Code::Protocol | Code::NoSpace
                ))
        {
            let _ = blocking(move || {
                disk.discard();
                Ok(())
            })
            .await;
        }
        result
    }

    /// Moves the body from the stream to the disk. It reads all the time. It writes when the disk is free and either
    /// enough bytes have arrived or the gathering time has passed.
    async fn pump(
        &mut self,
        file: &WantedFile,
        stream: &mut quinn::RecvStream,
        body: &mut BodyReader,
        credit: &mut UnflushedBytes,
        (idle, job): (&mut Option<FileWriter>, &mut Option<DiskJob>),
        receipt: &mut MessageWriter,
    ) -> Result<(), Reason> {
        let config = self.receiver.session.config.clone();
        let receiver = self.receiver;
        let silence = receiver.session.window.silence(config.deadline);
        tokio::pin!(silence);
        let mut working_sent_at = Instant::now();
        let mut pending_since = Instant::now();
        // Bytes written under this permit since `counted_since`.
        let mut recent_bytes = 0;
        let mut counted_since = pending_since;
        let mut ended = false;
        loop {
            let should_write = ended
                || body.pending() >= WRITE_SIZE
                || pending_since.elapsed() >= GATHER_TIME
                || self.receiver.session.window.is_short();
            if should_write && idle.is_some() && body.is_ready() {
                self.receiver.working(receipt, self.permit()).await?;
                if let Some(mut disk) = idle.take() {
                    let (runs, bytes): (Vec<Run>, _) = body.drain();
                    let running = tokio::task::spawn_blocking(move || {
                        let written = disk.write(runs);
                        (disk, bytes, written)
                    });
                    *job = Some(DiskJob {
                        running,
                        _at_work: receiver.session.window.start_work(),
                    });
                }
            }
            if ended && job.is_none() {
                return Ok(());
            }
            let is_idle = job.is_none();
            tokio::select! {
                biased;
                () = self.claim.superseded() => return Err(Code::Superseded.into()),
                done = async { (&mut job.as_mut().expect("guarded").running).await }, if !is_idle => {
                    *job = None;
                    let (disk, bytes, written) = done.map_err(|_| Reason::from(Code::Internal))?;
                    credit.release(bytes);
                    // Restart the silence timer now, not at the next poll.
                    silence.set(receiver.session.window.silence(config.deadline));
                    *idle = Some(disk);
                    written?;
                    self.receiver.moved(file.id, bytes as u64);
                    recent_bytes += bytes;
                }
                read = read_ready(stream, body), if !ended => {
                    let (bytes, more) = read?;
                    if body.pending() == bytes {
                        pending_since = Instant::now();
                    }
                    credit.add(bytes);
                    ended = !more;
                }
                () = sleep_until(pending_since + GATHER_TIME), if is_idle && body.is_ready() => {}
                () = sleep_until(counted_since + config.stall), if is_idle && self.permit.is_some() => {
                    if recent_bytes < SLOW_TRANSFER_LIMIT {
                        self.permit = None;
                    }
                    recent_bytes = 0;
                    counted_since = Instant::now();
                }
                () = &mut silence, if is_idle => return Err(StreamError::TimedOut.into()),
                () = sleep_until(working_sent_at + WORKING_INTERVAL), if !is_idle => {
                    working_sent_at = Instant::now();
                    // A peer that does not read this will not read the receipt either.
                    let _ = timeout(WORKING_INTERVAL, receipt.write(&Working {})).await;
                }
            }
        }
    }

    /// Takes a permit if none is held.
    async fn permit(&mut self) -> Result<(), Reason> {
        if self.permit.is_none() {
            self.permit = Some(
                self.claim
                    .or_superseded(self.receiver.session.permits.acquire())
                    .await?,
            );
        }
        Ok(())
    }
}

/// Writes the body of a small file: the ranges of the plan in order, and its holes.
fn write_small(upload: &mut dyn Upload, plan: &Plan, body: &[u8]) -> io::Result<()> {
    let in_order = upload.in_order();
    let holes = plan.holes().iter().map(|hole| (*hole, true));
    let ranges = plan.ranges.iter().map(|range| (*range, false));
    let mut parts: Vec<(Range, bool)> = ranges.chain(holes).collect();
    parts.sort_unstable_by_key(|(range, _)| range.offset);
    let mut rest = body;
    for (range, is_hole) in parts {
        if is_hole && in_order {
            upload.write_at(&vec![0; range.length as usize], range.offset)?;
        } else if is_hole {
            upload.make_hole(range.offset..range.offset + range.length)?;
        } else {
            let (part, after) = rest.split_at(rest.len().min(range.length as usize));
            upload.write_at(part, range.offset)?;
            rest = after;
        }
    }
    Ok(())
}

/// Reads the available data, up to [`WRITE_SIZE`] bytes, and waits only for the first chunk. Returns the number of new
/// bytes that wait to be written, and whether the stream continues. Cancelling loses nothing.
async fn read_ready(
    stream: &mut quinn::RecvStream,
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
