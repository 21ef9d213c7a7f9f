//! The JSON objects of `--json`. They may hold text exactly as a peer wrote it, such as names and the text of an offer.

use std::time::Instant;

use data_encoding::BASE64;
use haul::internal::error::text::is_unprintable;
use haul::{Event, Kind, RelativePath, Settled};
use serde_json::{Value, json};

use super::progress::Progress;

/// Formats an object on one line. Characters that could control a terminal are written as `\u....`, which JSON parsers
/// read as the same.
pub(super) fn to_text(object: &Value) -> String {
    let mut text = String::new();
    let mut units = [0; 2];
    // Compact JSON has such characters only in strings.
    for c in object.to_string().chars() {
        if is_unprintable(c) {
            for unit in c.encode_utf16(&mut units) {
                text.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            text.push(c);
        }
    }
    text
}

/// Sets a field to a name as text, and `<field>_bytes` to its bytes in base64 if it is not UTF-8.
pub(super) fn set_name(object: &mut Value, field: &str, bytes: &[u8]) {
    object[field] = String::from_utf8_lossy(bytes).into();
    if std::str::from_utf8(bytes).is_err() {
        object[format!("{field}_bytes")] = BASE64.encode(bytes).into();
    }
}

/// Returns the name of a kind of entry.
pub(super) fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::File => "file",
        Kind::Directory => "directory",
        Kind::Symlink => "symlink",
    }
}

/// Returns the object of an error that ended the command or the session.
pub(super) fn error(error: &dyn std::fmt::Display) -> Value {
    json!({"type": "error", "why": error.to_string()})
}

/// Returns the object of an event, if it has one.
pub(super) fn event(event: &Event) -> Option<Value> {
    Some(match event {
        Event::Connected { address, key_id } => {
            json!({"type": "start", "address": address.to_string(), "key_id": key_id})
        }
        Event::Routed { address, route } => {
            json!({"type": "route", "route": route.word(), "address": address.to_string()})
        }
        Event::Settled {
            path,
            kind,
            size,
            result,
            ..
        } => settled(path, *kind, *size, result),
        Event::Removed { path } => {
            json!({"type": "removed", "path": String::from_utf8_lossy(path.as_bytes())})
        }
        Event::Lost {
            reason: why,
            retry_for,
        } => {
            json!({"type": "lost", "why": why.to_string(), "retry_for": retry_for.as_secs_f64()})
        }
        Event::Reconnecting { attempt, wait } => {
            json!({"type": "reconnecting", "attempt": attempt, "wait": wait.as_secs_f64()})
        }
        Event::Reconnected { address } => {
            json!({"type": "reconnected", "address": address.to_string()})
        }
        Event::GoingAway { reason: why } => json!({"type": "going_away", "why": why.to_string()}),
        _ => return None,
    })
}

fn settled(path: &RelativePath, kind: Kind, size: u64, result: &Settled) -> Value {
    let mut object = json!({"type": "file", "path": "", "kind": kind_name(kind), "bytes": size});
    set_name(&mut object, "path", path.as_bytes());
    match result {
        Settled::Committed => object["result"] = "committed".into(),
        Settled::Skipped => object["result"] = "skipped".into(),
        Settled::Failed(why) | Settled::Omitted(why) => {
            let omitted = matches!(result, Settled::Omitted(_));
            object["result"] = if omitted { "omitted" } else { "failed" }.into();
            object["code"] = why.code.name().into();
            object["why"] = why.to_string().into();
        }
    }
    object
}

/// Returns the object of the progress of a running session.
pub(super) fn progress(progress: &Progress, now: Instant) -> Value {
    let found = progress.found();
    json!({
        "type": "progress",
        "files": progress.files_settled(), "files_found": found.files,
        "bytes": progress.bytes_done(), "bytes_found": found.bytes,
        "search_complete": found.complete, "seconds": progress.elapsed(now).as_secs_f64(),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use haul::Code;

    use super::*;

    fn settled(component: &[u8], result: Settled) -> Event {
        let path = RelativePath::from_components([component]).unwrap();
        Event::Settled {
            id: Some(1),
            path,
            kind: Kind::File,
            size: 7,
            result,
        }
    }

    #[test]
    fn json_keeps_the_bytes_of_names_that_are_not_utf8() {
        let object = event(&settled(b"\xff\n", Settled::Failed(Code::NoSpace.into()))).unwrap();
        assert_eq!(object["path"], "\u{fffd}\n");
        assert_eq!(object["path_bytes"], "/wo=");
        assert_eq!(
            (&object["result"], &object["code"]),
            (&"failed".into(), &"NoSpace".into())
        );
        let plain = event(&settled("ä".as_bytes(), Settled::Skipped)).unwrap();
        assert_eq!(
            (&plain["path"], plain.get("path_bytes")),
            (&"ä".into(), None)
        );
    }

    #[test]
    fn json_keeps_peer_text_and_escapes_control_characters() {
        let evil = "\x1b]52;c;ZXZpbA==\x07\u{9b}2J\u{202e}\u{e0001}\n\\";
        let text = to_text(&json!({ "why": evil }));
        assert!(!text.contains(is_unprintable), "{text:?}");
        let back: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(back["why"], evil);
    }

    #[test]
    fn json_times_are_in_seconds() {
        let lost = Event::Lost {
            reason: "the peer has restarted".into(),
            retry_for: Duration::from_secs(600),
        };
        assert_eq!(event(&lost).unwrap()["retry_for"], 600.0);
    }
}
