//! Content that is read once and in order, and of which nobody knows beforehand how long it is.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::protocol::content_hasher;

/// Bytes read at a time: as much as a pipe of Linux holds.
const READ_SIZE: usize = 64 << 10;
/// Reads that may wait to be sent, 1 MiB of them; beyond, nothing is read, and whoever writes into the pipe waits.
const READ_AHEAD_LIMIT: usize = 16;

/// What a reader gives, as the content of a file.
pub struct Pipe {
    input: Mutex<Option<Box<dyn Read + Send>>>,
    /// It is the content of a file of unknown size, and is read anew for each attempt.
    file: bool,
    bytes: AtomicU64,
    /// The most that any attempt has taken out.
    most: AtomicU64,
    ended: AtomicBool,
}

/// The next of what came out of a pipe.
pub(crate) enum Piece {
    /// Some of the content; never empty.
    Bytes(Bytes),
    /// The input has ended: BLAKE3 of all of it, and its length.
    End([u8; 32], u64),
    /// It could not be read on.
    Failed(io::Error),
}

impl Pipe {
    /// A pipe of which nothing is read yet.
    pub fn new(input: impl Read + Send + 'static) -> Self {
        Self {
            input: Mutex::new(Some(Box::new(input))),
            file: false,
            bytes: AtomicU64::new(0),
            most: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        }
    }

    /// The content of a file whose size is not known: each attempt to send it gives the [`next`](Self::begin_with) reader.
    pub(crate) fn of_file() -> Self {
        Self {
            input: Mutex::new(None),
            file: true,
            ..Self::new(io::empty())
        }
    }

    /// Whether it is the content of a file, which can be read again.
    pub(crate) fn is_file(&self) -> bool {
        self.file
    }

    /// Bytes taken out so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Notes that so many bytes more were taken out; returns how many of them no attempt has taken out before.
    pub(crate) fn moved(&self, bytes: u64) -> u64 {
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        bytes.saturating_sub(self.most.fetch_max(bytes, Ordering::Relaxed))
    }

    /// Notes that the end was taken out.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Whether nothing more can come.
    pub(crate) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Whether reading has begun: from then on it cannot be sent anew.
    pub(crate) fn is_spent(&self) -> bool {
        !self.file
            && self
                .input
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .is_none()
    }

    /// Begins to read a file, from its start.
    pub(crate) fn begin_with(&self, input: impl Read + Send + 'static) -> mpsc::Receiver<Piece> {
        self.bytes.store(0, Ordering::Relaxed);
        start(Box::new(input))
    }

    /// Begins to read; `None` when that has been done.
    ///
    /// The thread is one of its own: a read may wait for as long as somebody types, and the runtime would not end before
    /// its threads do. It ends with the input, or with the next that comes when nobody wants it any more.
    pub(crate) fn begin(&self) -> Option<mpsc::Receiver<Piece>> {
        let input = self
            .input
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()?;
        Some(start(input))
    }
}

/// Reads in a thread of its own.
fn start(input: Box<dyn Read + Send>) -> mpsc::Receiver<Piece> {
    let (to, pieces) = mpsc::channel(READ_AHEAD_LIMIT);
    let failed = to.clone();
    let thread = std::thread::Builder::new()
        .name("haul-input".into())
        .spawn(move || read(input, &to));
    if let Err(error) = thread {
        // There is room for it: nothing else was sent.
        let _ = failed.try_send(Piece::Failed(error));
    }
    pieces
}

fn read(mut input: Box<dyn Read + Send>, to: &mpsc::Sender<Piece>) {
    let mut buffer = vec![0; READ_SIZE];
    let mut hasher = content_hasher(0, &[]);
    let mut bytes = 0;
    loop {
        let piece = match input.read(&mut buffer) {
            Ok(0) => Piece::End(hasher.finalize().into(), bytes),
            Ok(length) => {
                hasher.update(&buffer[..length]);
                bytes += length as u64;
                Piece::Bytes(Bytes::copy_from_slice(&buffer[..length]))
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => Piece::Failed(error),
        };
        let last = !matches!(piece, Piece::Bytes(_));
        if to.blocking_send(piece).is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts what was read of it, without an end.
    struct Endless(std::sync::Arc<AtomicU64>);

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(buffer.len())
        }
    }

    #[test]
    fn what_nobody_takes_is_not_read() {
        let reads = std::sync::Arc::new(AtomicU64::new(0));
        let pipe = Pipe::new(Endless(reads.clone()));
        assert!(!pipe.is_spent());
        let mut pieces = pipe.begin().unwrap();
        assert!(pipe.is_spent() && pipe.begin().is_none());
        for _ in 0..100 {
            assert!(
                matches!(pieces.blocking_recv(), Some(Piece::Bytes(bytes)) if bytes.len() == READ_SIZE)
            );
        }
        // What waits, and the one that waits to be among it.
        assert!(reads.load(Ordering::SeqCst) <= 100 + READ_AHEAD_LIMIT as u64 + 1);
    }

    #[test]
    fn an_input_is_hashed_and_its_end_told_from_a_failure() {
        let content: &[u8] = b"some of it, and the rest";
        let all = |input: Box<dyn Read + Send>| {
            let mut pieces = Pipe::new(input).begin().unwrap();
            std::iter::from_fn(move || pieces.blocking_recv()).collect::<Vec<_>>()
        };
        let pieces = all(Box::new((&content[..7]).chain(&content[7..])));
        assert!(
            matches!(&pieces[..], [Piece::Bytes(_), Piece::Bytes(_), Piece::End(digest, 24)] if *blake3::hash(content).as_bytes() == *digest)
        );
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        assert!(matches!(
            &all(Box::new(content.chain(Broken)))[..],
            [Piece::Bytes(_), Piece::Failed(_)]
        ));
    }
}
