//! Prints a listing, as text or as JSON.

use std::io::{BufWriter, Stdout, Write};

use haul::{Kind, Listed, Reason, RelativePath, Time, printable};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::json;
use super::print::note;
use super::text::failure;

/// The format of a listing.
#[derive(Clone, Copy)]
pub(crate) enum Format {
    /// Names, with mode, size, time and the targets of links if `long`.
    Text {
        long: bool,
    },
    Json,
}

/// Buffered lines for standard output.
pub(crate) struct Lines {
    format: Format,
    out: BufWriter<Stdout>,
}

impl Lines {
    pub(crate) fn new(format: Format) -> Self {
        Self {
            format,
            out: BufWriter::new(std::io::stdout()),
        }
    }

    /// Prints a line. Returns false once standard output has no reader. May block for as long as the reader, such as a pager,
    /// does not read.
    pub(crate) fn print(&mut self, path: &RelativePath, listed: &Listed) -> bool {
        let line = match self.format {
            Format::Text { long: true } => long(path, listed),
            Format::Text { long: false } => short(path, listed),
            Format::Json => json::to_text(&object(path, listed)),
        };
        // Other tasks keep running meanwhile, so that the server learns that this client still reads.
        tokio::task::block_in_place(|| writeln!(self.out, "{line}")).is_ok()
    }

    /// Reports an entry that could not be read. Returns false once standard output has no reader.
    pub(crate) fn print_failure(&mut self, path: &RelativePath, why: &Reason) -> bool {
        if let Format::Json = self.format {
            let mut object =
                json!({"type": "failed", "code": why.code.name(), "why": why.to_string()});
            json::set_name(&mut object, "path", path.as_bytes());
            return writeln!(self.out, "{}", json::to_text(&object)).is_ok();
        }
        let reads_on = self.flush();
        note(&format!("haul: {}", failure(path, why)));
        reads_on
    }

    /// Writes the buffered lines. Returns false once standard output has no reader.
    pub(crate) fn flush(&mut self) -> bool {
        tokio::task::block_in_place(|| self.out.flush()).is_ok()
    }
}

fn short(path: &RelativePath, listed: &Listed) -> String {
    let slash = if listed.kind == Some(Kind::Directory) {
        "/"
    } else {
        ""
    };
    format!("{path}{slash}")
}

/// Formats mode, size, time and name in columns, like `ls -l`.
fn long(path: &RelativePath, listed: &Listed) -> String {
    let size = listed
        .size
        .map_or_else(|| "-".into(), |size| size.to_string());
    let time = listed
        .modified
        .map_or_else(|| "-".into(), |time| clock(time, false));
    let mut line = format!("{}  {size:>12}  {time:>20}  {path}", mode(listed));
    if let Some(target) = &listed.target {
        line += &format!(" -> {}", printable(target));
    }
    line
}

fn mode(listed: &Listed) -> String {
    let mode = listed.mode.unwrap_or(0);
    let kind = match listed.kind {
        Some(Kind::File) => '-',
        Some(Kind::Directory) => 'd',
        Some(Kind::Symlink) => 'l',
        None => '?',
    };
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 > 0 { 'r' } else { '-' });
        text.push(if bits & 2 > 0 { 'w' } else { '-' });
        text.push(match (mode & special > 0, bits & 1 > 0) {
            (false, true) => 'x',
            (false, false) => '-',
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
        });
    }
    text
}

/// Formats a time as RFC 3339 in UTC. Years outside of 0 to 9999 become `@` and the seconds since 1970, as `date` reads them.
fn clock(time: Time, nanoseconds: bool) -> String {
    let Some(at) = OffsetDateTime::from_unix_timestamp(time.seconds)
        .ok()
        .filter(|at| (0..10_000).contains(&at.year()))
    else {
        return format!("@{}", time.seconds);
    };
    let fraction = if nanoseconds {
        format!(".{:09}", time.nanoseconds)
    } else {
        String::new()
    };
    let month = u8::from(at.month());
    let (hour, minute, second) = at.to_hms();
    format!(
        "{:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z",
        at.year(),
        at.day()
    )
}

fn object(path: &RelativePath, listed: &Listed) -> Value {
    let kind = listed.kind.map_or("special", json::kind_name);
    let mut object = json!({"type": "entry", "kind": kind});
    json::set_name(&mut object, "path", path.as_bytes());
    if let Some(size) = listed.size {
        object["bytes"] = size.into();
    }
    if let Some(time) = listed.modified {
        object["modified"] = clock(time, true).into();
    }
    if let Some(mode) = listed.mode {
        object["mode"] = format!("{mode:04o}").into();
    }
    if let Some(target) = &listed.target {
        json::set_name(&mut object, "target", target);
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use haul::internal::protocol::Components;

    fn listed(name: &[u8], kind: Option<Kind>, mode: u32) -> (RelativePath, Listed) {
        let path = RelativePath::from_components([name]).unwrap();
        let modified = Some(Time {
            seconds: -1,
            nanoseconds: 5,
        });
        let target = None;
        let size = (kind == Some(Kind::File)).then_some(1_234_567);
        let components = Components::from(&path);
        (
            path,
            Listed {
                path: components,
                kind,
                size,
                modified,
                mode: Some(mode),
                target,
            },
        )
    }

    #[test]
    fn long_lines_look_like_ls_and_are_escaped() {
        let (path, mut link) = listed(b"a\x1b[2J\n", Some(Kind::Symlink), 0o777);
        link.target = Some(b"to\x07".to_vec());
        assert_eq!(
            long(&path, &link),
            "lrwxrwxrwx             -  1969-12-31T23:59:59Z  a\\u{1b}[2J\\n -> to\\u{7}"
        );
        let (path, file) = listed(b"f", Some(Kind::File), 0o4640);
        assert_eq!(
            long(&path, &file),
            "-rwSr-----       1234567  1969-12-31T23:59:59Z  f"
        );
        let (_, fifo) = listed(b"p", None, 0o1777);
        assert_eq!(mode(&fifo), "?rwxrwxrwt");
        let (path, directory) = listed(b"d", Some(Kind::Directory), 0o755);
        assert_eq!(short(&path, &directory), "d/");
    }

    #[test]
    fn json_keeps_bytes_and_nanoseconds() {
        let (path, file) = listed(b"\xff\n", Some(Kind::File), 0o644);
        let object = object(&path, &file);
        assert_eq!(
            (&object["path"], &object["path_bytes"]),
            (&"\u{fffd}\n".into(), &"/wo=".into())
        );
        assert_eq!(
            (&object["modified"], &object["mode"]),
            (&"1969-12-31T23:59:59.000000005Z".into(), &"0644".into())
        );
        assert_eq!(
            (&object["bytes"], &object["kind"]),
            (&1_234_567.into(), &"file".into())
        );
    }

    #[test]
    fn every_time_can_be_formatted() {
        for (seconds, shown) in [
            (4_300_000_000, "2106-04-06T12:26:40Z"),
            (i64::MAX, "@9223372036854775807"),
        ] {
            assert_eq!(
                clock(
                    Time {
                        seconds,
                        nanoseconds: 0
                    },
                    false
                ),
                shown
            );
        }
        assert_eq!(
            clock(
                Time {
                    seconds: i64::MIN,
                    nanoseconds: 0
                },
                false
            ),
            "@-9223372036854775808"
        );
    }
}
