//! Writes traces of connections in qlog format (draft-ietf-quic-qlog-main-schema), one file each, for tools such as
//! qvis.
//!
//! quinn records packets sent, received and lost, and the metrics of recovery and congestion control, but no frames.

use std::path::Path;

use crate::error::{Error, Result};

/// The end of a connection that writes the trace.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Role {
    Client,
    Server,
}

/// Creates the directory if it is missing, and checks that files can be created in it.
///
/// # Errors
/// [`Error::Io`] when they cannot be created; [`Error::Usage`] when haul was built without the feature `qlog`.
pub(crate) fn prepare(directory: &Path) -> Result<()> {
    if !cfg!(feature = "qlog") {
        return Err(Error::Usage(
            "cannot write qlog files: this haul was built without its feature `qlog`".into(),
        ));
    }
    let unusable = || Error::io(format!("cannot write qlog files to {}", shown(directory)));
    std::fs::create_dir_all(directory).map_err(unusable())?;
    if !directory.is_dir() {
        return Err(unusable()(std::io::ErrorKind::NotADirectory.into()));
    }
    rustix::fs::access(
        directory,
        rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK,
    )
    .map_err(|errno| unusable()(errno.into()))
}

fn shown(path: &Path) -> String {
    crate::error::text::printable(path.as_os_str().as_encoded_bytes())
}

#[cfg(feature = "qlog")]
pub(crate) use file::record;

#[cfg(feature = "qlog")]
mod file {
    use std::fs::File;
    use std::io::{self, BufWriter, Write};
    use std::path::Path;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

    use quinn::{QlogConfig, TransportConfig};
    use tracing::warn;

    use super::{Role, shown};

    /// Bytes gathered into one write. quinn writes an event of some 150 bytes for each packet, while it locks the
    /// connection.
    const BUFFER_SIZE: usize = 64 << 10;
    /// Longest time that events stay in the buffer, so that a trace can be read during a connection and after a
    /// crash.
    const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

    /// Adds a new trace file to the configuration of one connection. If it cannot be created or written to, a warning
    /// is logged and the connection continues.
    pub(crate) fn record(transport: &mut TransportConfig, directory: &Path, role: Role) {
        match Trace::create(directory, role) {
            Ok(trace) => {
                let mut config = QlogConfig::default();
                config.title(Some("haul".into())).writer(Box::new(trace));
                transport.qlog_stream(config.into_stream());
            }
            Err(error) => warn!(%error, "cannot create a qlog file in {}", shown(directory)),
        }
    }

    /// A trace's file. The first write error ends the trace, but not the connection.
    struct Trace<W: Write> {
        file: Option<BufWriter<W>>,
        flushed: Instant,
    }

    impl Trace<File> {
        /// Creates `1795427854.123456-client-4711-0.sqlog`: seconds since 1970, the role, the process, and a number
        /// within it. Names sort by time and are unique.
        fn create(directory: &Path, role: Role) -> io::Result<Self> {
            static CONNECTIONS: AtomicU32 = AtomicU32::new(0);
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let role = match role {
                Role::Client => "client",
                Role::Server => "server",
            };
            let seconds = now.as_secs();
            let micros = now.subsec_micros();
            let process = std::process::id();
            let number = CONNECTIONS.fetch_add(1, Ordering::Relaxed);
            let name = format!("{seconds:010}.{micros:06}-{role}-{process}-{number}.sqlog");
            Ok(Self::new(File::create_new(directory.join(name))?))
        }
    }

    impl<W: Write> Trace<W> {
        fn new(writer: W) -> Self {
            Self {
                file: Some(BufWriter::with_capacity(BUFFER_SIZE, writer)),
                flushed: Instant::now(),
            }
        }

        fn end_at_error(&mut self, written: io::Result<()>) {
            if let Err(error) = written
                && let Some(file) = self.file.take()
            {
                warn!(%error, "cannot write the qlog file any further");
                // Its buffer is dropped unwritten: another write would fail too.
                drop(file.into_parts());
            }
        }
    }

    impl<W: Write> Write for Trace<W> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if let Some(file) = &mut self.file {
                let written = file.write_all(bytes);
                self.end_at_error(written);
                if self.flushed.elapsed() >= FLUSH_INTERVAL {
                    self.flush()?;
                }
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            self.flushed = Instant::now();
            if let Some(file) = &mut self.file {
                let written = file.flush();
                self.end_at_error(written);
            }
            Ok(())
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        /// A disk with room for this many bytes.
        struct Disk(usize);

        impl Write for Disk {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                if self.0 == 0 {
                    return Err(io::ErrorKind::StorageFull.into());
                }
                let taken = bytes.len().min(self.0);
                self.0 -= taken;
                Ok(taken)
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }

        #[test]
        fn a_full_disk_ends_the_trace_but_not_the_connection() {
            let mut trace = Trace::new(Disk(BUFFER_SIZE));
            for _ in 0..100 {
                assert_eq!(trace.write(&[0; 1000]).unwrap(), 1000);
            }
            trace.flush().unwrap();
            assert!(trace.file.is_none());
            assert_eq!(trace.write(b"more").unwrap(), 4);
        }

        #[test]
        fn names_sort_by_time_and_do_not_collide() {
            let directory = tempfile::tempdir().unwrap();
            for role in [Role::Client, Role::Server, Role::Client] {
                Trace::create(directory.path(), role)
                    .unwrap()
                    .write_all(b"x")
                    .unwrap();
            }
            let mut names: Vec<_> = std::fs::read_dir(directory.path())
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            let roles: Vec<_> = names
                .iter()
                .map(|name| name.split('-').nth(1).unwrap())
                .collect();
            assert_eq!(roles, ["client", "server", "client"], "{names:?}");
        }
    }
}
