//! The known_hosts file of a client: one `HOST[:PORT] SHA256:...` a line, `#` starts a comment.
//!
//! A host may have several lines, one for each of its keys. A line without a port is for [`DEFAULT_PORT`]; IPv6
//! addresses are in brackets.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::net::Ipv6Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::home::lock_exclusively;
use super::identity::KeyId;
use crate::error::text::printable;
use crate::error::{Error, Result};
use crate::protocol::DEFAULT_PORT;

/// Formats host and port as in known_hosts and in messages: lower case, IPv6 shortened and in brackets.
pub fn host_and_port(host: &str, port: u16) -> String {
    let bare = host
        .strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(host);
    match bare.parse::<Ipv6Addr>() {
        Ok(address) => format!("[{address}]:{port}"),
        Err(_) if bare.contains(':') => format!("[{}]:{port}", bare.to_ascii_lowercase()),
        Err(_) => format!("{}:{port}", bare.to_ascii_lowercase()),
    }
}

/// Returns the keys listed for a host (in the form of [`host_and_port`]); none when the file is missing.
///
/// # Errors
/// [`Error::Home`] when the file cannot be read, or with the number of an invalid line: ignoring it silently could
/// drop the protection it was meant for.
pub fn find(file: &Path, host: &str) -> Result<Vec<KeyId>> {
    let bad = |why| Error::Home {
        path: file.to_owned(),
        why,
    };
    let text = match std::fs::read(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|e| bad(format!("cannot read the file: {e}")))?,
    };
    let mut keys = Vec::new();
    for (number, line) in (1..).zip(String::from_utf8_lossy(&text).lines()) {
        match parse(line) {
            Ok(Some((known, key_id))) if known == host => keys.push(key_id),
            Ok(_) => {}
            Err(why) => {
                return Err(bad(format!(
                    "line {number} is invalid ({why}): {}",
                    printable(line.as_bytes())
                )));
            }
        }
    }
    Ok(keys)
}

/// Adds a line for a host (in the form of [`host_and_port`]), unless it exists. Creates a missing file with private
/// mode. Concurrent processes lose no line.
///
/// # Errors
/// [`Error::Io`] when the system refuses.
pub fn add(file: &Path, host: &str, key_id: &KeyId) -> Result<()> {
    add_line(file, host, key_id).map_err(Error::io(format!(
        "cannot add {host} to {}",
        file.display()
    )))
}

fn add_line(file: &Path, host: &str, key_id: &KeyId) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .mode(0o600)
        .open(file)?;
    lock_exclusively(&file)?;
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    let line = format!("{host} {key_id}");
    if text.split(|&b| b == b'\n').any(|l| l == line.as_bytes()) {
        return Ok(());
    }
    // An editor may have left the last line without its newline.
    let before = if text.last().is_none_or(|&b| b == b'\n') {
        ""
    } else {
        "\n"
    };
    file.write_all(format!("{before}{line}\n").as_bytes())?;
    file.sync_all()
}

/// Parses a line into host and key; `None` for a blank line or a comment.
fn parse(line: &str) -> Result<Option<(String, KeyId)>, String> {
    let line = line.split_once('#').map_or(line, |(before, _)| before);
    let mut fields = line.split_whitespace();
    let Some(host) = fields.next() else {
        return Ok(None);
    };
    let key_id = fields.next().ok_or("no key id after the host")?;
    if fields.next().is_some() {
        return Err("text after the key id".into());
    }
    let key_id = key_id.parse::<KeyId>().map_err(|e| e.to_string())?;
    let (host, port) = split_port(host)?;
    Ok(Some((host_and_port(host, port), key_id)))
}

/// Splits `HOST[:PORT]`; an IPv6 address without brackets has no port.
fn split_port(text: &str) -> Result<(&str, u16), String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let port = port.map_or(Ok(DEFAULT_PORT), |p| {
        p.parse().map_err(|_| format!("{p} is not a port"))
    })?;
    if host.is_empty() {
        Err("no host".into())
    } else {
        Ok((host, port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: KeyId = KeyId([7; 32]);
    const OTHER: KeyId = KeyId([8; 32]);

    fn file() -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("known_hosts");
        (directory, file)
    }

    #[test]
    fn an_added_host_is_found_in_any_spelling() {
        let (_directory, file) = file();
        assert_eq!(find(&file, "host:1").unwrap(), []);
        for (added, sought) in [
            (("Example.ORG", 1), ("example.org", 1)),
            (("[::1]", 2), ("0:0::1", 2)),
        ] {
            add(&file, &host_and_port(added.0, added.1), &KEY).unwrap();
            assert_eq!(
                find(&file, &host_and_port(sought.0, sought.1)).unwrap(),
                [KEY]
            );
        }
        let expected = format!("example.org:1 {KEY}\n[::1]:2 {KEY}\n");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), expected);
        add(&file, "example.org:1", &KEY).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), expected);
        assert_eq!(find(&file, "example.org:2").unwrap(), []);
    }

    #[test]
    fn only_the_owner_may_read_a_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let (_directory, file) = file();
        add(&file, "host:1", &KEY).unwrap();
        assert_eq!(
            std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn hand_written_files_are_read() {
        let (_directory, file) = file();
        let text = format!(
            "# ours\n\nhost {KEY}\n  HOST:4433\t{OTHER} # the new one\n::1 {KEY}\n[fe80::1] {OTHER}"
        );
        std::fs::write(&file, text).unwrap();
        assert_eq!(find(&file, "host:4433").unwrap(), [KEY, OTHER]);
        assert_eq!(find(&file, "[::1]:4433").unwrap(), [KEY]);
        assert_eq!(find(&file, "[fe80::1]:4433").unwrap(), [OTHER]);
        add(&file, "new:1", &KEY).unwrap();
        assert_eq!(
            find(&file, "[fe80::1]:4433").unwrap(),
            [OTHER],
            "the line without newline was damaged"
        );
        assert_eq!(find(&file, "new:1").unwrap(), [KEY]);
    }

    #[test]
    fn an_invalid_line_is_reported_by_number() {
        let (_directory, file) = file();
        for bad in [
            "host",
            "host SHA256:x",
            &format!("host:x {KEY}"),
            &format!(":1 {KEY}"),
            &format!("host {KEY} x"),
        ] {
            std::fs::write(&file, format!("# one\n{bad}\nhost {KEY}\n")).unwrap();
            let error = find(&file, "host:4433").unwrap_err();
            assert!(
                matches!(&error, Error::Home { path, why } if *path == file && why.contains("line 2")),
                "{error}"
            );
        }
        std::fs::write(&file, b"\xff\x1b[2J\n").unwrap();
        let error = find(&file, "host:4433").unwrap_err().to_string();
        assert!(!error.contains('\x1b'), "{error:?}");
    }

    #[test]
    fn concurrent_additions_are_all_kept() {
        let (_directory, file) = file();
        std::thread::scope(|scope| {
            for host in 0..16 {
                let file = &file;
                scope.spawn(move || {
                    add(file, &host_and_port(&format!("host{host}"), 1), &KEY).unwrap()
                });
            }
        });
        for host in 0..16 {
            assert_eq!(find(&file, &format!("host{host}:1")).unwrap(), [KEY]);
        }
    }
}
