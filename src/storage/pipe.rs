//! Content that is read once and in order, and whose length is not known in advance.

use std::io::{self, Read};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::error::lock::lock;
use crate::protocol::content_hasher;

/// Bytes read at a time: the capacity of a Linux pipe.
const READ_SIZE: usize = 64 << 10;
/// Reads that may wait to be sent (1 MiB). Beyond that haul stops reading, and the program that writes into the pipe
/// blocks.
const READ_AHEAD_LIMIT: usize = 16;

/// The output of a reader, as the content of a file.
pub struct Pipe {
    input: Mutex<Option<Box<dyn Read + Send>>>,
    /// Whether it is a file of unknown size, which each attempt reads from the start.
    file: bool,
    bytes: AtomicU64,
    /// The most bytes that any attempt has consumed.
    most: AtomicU64,
    ended: AtomicBool,
}

/// The next piece of a pipe's content.
pub(crate) enum Piece {
    /// Part of the content; never empty.
    Bytes(Bytes),
    /// The end of the input: BLAKE3 and length of all of it.
    End([u8; 32], u64),
    /// A read failed.
    Failed(io::Error),
}

impl Pipe {
    /// Creates a pipe that has not been read yet.
    pub fn new(input: impl Read + Send + 'static) -> Self {
        Self {
            input: Mutex::new(Some(Box::new(input))),
            file: false,
            bytes: AtomicU64::new(0),
            most: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        }
    }

    /// Creates a pipe for a file of unknown size: each attempt to send it supplies the [`next`](Self::begin_with)
    /// reader.
    pub(crate) fn of_file() -> Self {
        Self {
            input: Mutex::new(None),
            file: true,
            ..Self::new(io::empty())
        }
    }

    /// Whether it is a file, which can be read again.
    pub(crate) fn is_file(&self) -> bool {
        self.file
    }

    /// Bytes consumed so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Counts consumed bytes; returns how many of them no earlier attempt has consumed.
    pub(crate) fn moved(&self, bytes: u64) -> u64 {
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        bytes.saturating_sub(self.most.fetch_max(bytes, Ordering::Relaxed))
    }

    /// Records that the end was consumed.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Whether the end was consumed.
    pub(crate) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Whether reading has started; then the content cannot be sent again.
    pub(crate) fn is_spent(&self) -> bool {
        !self.file && lock(&self.input).is_none()
    }

    /// Starts to read a file from its start.
    pub(crate) fn begin_with(&self, input: impl Read + Send + 'static) -> mpsc::Receiver<Piece> {
        self.bytes.store(0, Ordering::Relaxed);
        start(Box::new(input))
    }

    /// Starts to read; `None` if reading has started before.
    ///
    /// It uses a thread of its own: a read may wait for a person who types, and the runtime waits for its threads when
    /// it ends. The thread ends with the input, or at the next piece after the receiver was dropped.
    pub(crate) fn begin(&self) -> Option<mpsc::Receiver<Piece>> {
        let input = lock(&self.input).take()?;
        Some(start(input))
    }
}

/// Reads in a thread of its own.
fn start(input: Box<dyn Read + Send>) -> mpsc::Receiver<Piece> {
    let (sender, pieces) = mpsc::channel(READ_AHEAD_LIMIT);
    let failure_sender = sender.clone();
    let thread = std::thread::Builder::new()
        .name("haul-input".into())
        .spawn(move || read(input, &sender));
    if let Err(error) = thread {
        // The channel has room: nothing else was sent.
        let _ = failure_sender.try_send(Piece::Failed(error));
    }
    pieces
}

fn read(mut input: Box<dyn Read + Send>, sender: &mpsc::Sender<Piece>) {
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
        if sender.blocking_send(piece).is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts its reads and never ends.
    struct Endless(std::sync::Arc<AtomicU64>);

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(buffer.len())
        }
    }

    #[test]
    fn the_input_is_read_only_as_far_as_it_is_consumed() {
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
        // The pieces in the channel, and the one that waits for room.
        assert!(reads.load(Ordering::SeqCst) <= 100 + READ_AHEAD_LIMIT as u64 + 1);
    }

    #[test]
    fn the_input_is_hashed_and_a_failure_is_not_an_end() {
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
