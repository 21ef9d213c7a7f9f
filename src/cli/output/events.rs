//! The lines that are printed for the events of a session.

use haul::internal::config::display_duration;
use haul::{Code, Event, Kind, RelativePath, Route, Settled};

use super::style::{Display, OtherEnd, Style};
use super::text::failure;

/// Returns the line to print for an event, if it has one.
pub(super) fn line_of(event: &Event, display: Display) -> Option<String> {
    let verbose = display.style == Style::Verbose;
    match event {
        Event::Settled {
            path, kind, result, ..
        } => line_of_result(path, *kind, result, display),
        _ if display.style == Style::Quiet => None,
        Event::Removed { path } if display.dry_run => Some(format!("would remove {path}")),
        Event::Removed { path } if verbose => Some(format!("removed {path}")),
        Event::Connected { address, key_id } if verbose => {
            Some(format!("connected to {address}, {key_id}"))
        }
        Event::Routed { address, route } => match route {
            Route::Direct if verbose => Some(format!("direct, at {address}")),
            Route::Punched if verbose => Some(format!("direct through the NATs, to {address}")),
            Route::Direct | Route::Punched => None,
            Route::Relayed => Some("by the relay, until a direct path opens".into()),
        },
        Event::Lost {
            reason: why,
            retry_for,
        } => {
            let time = display_duration(*retry_for);
            Some(match display.other_end {
                OtherEnd::Receiver => {
                    format!("haul: lost the receiver ({why}); waiting for it, for {time} at most")
                }
                OtherEnd::Server | OtherEnd::Sender => {
                    format!("haul: connection lost ({why}); trying again, for {time} at most")
                }
            })
        }
        Event::Reconnecting { attempt, wait } if verbose => {
            let seconds = wait.as_secs_f64();
            Some(format!(
                "trying again in {seconds:.1} s (attempt {attempt})"
            ))
        }
        Event::Reconnected { .. } => Some(match display.other_end {
            OtherEnd::Receiver => "haul: the receiver is back, going on".into(),
            OtherEnd::Server | OtherEnd::Sender => "haul: connected again, going on".into(),
        }),
        Event::GoingAway { reason: why } => Some(format!("{why}; waiting for running transfers")),
        _ => None,
    }
}

/// Returns the line to print for the result of an entry. Failures always have one. Vanished sources have one even when
/// quiet, because the exit code reports them too.
fn line_of_result(
    path: &RelativePath,
    kind: Kind,
    result: &Settled,
    display: Display,
) -> Option<String> {
    let Display { style, dry_run, .. } = display;
    match result {
        Settled::Failed(why) => Some(format!("haul: {}", failure(path, why))),
        Settled::Omitted(why) if style != Style::Quiet || why.code == Code::Vanished => {
            Some(format!("haul: {}", failure(path, why)))
        }
        _ if style == Style::Quiet => None,
        Settled::Committed if dry_run => {
            (kind != Kind::Directory).then(|| format!("would copy {path}"))
        }
        Settled::Committed if style == Style::Verbose => Some(path.to_string()),
        Settled::Skipped if style == Style::Verbose && kind != Kind::Directory => {
            Some(format!("{path} (unchanged)"))
        }
        Settled::Committed | Settled::Skipped | Settled::Omitted(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn display(style: Style) -> Display {
        Display {
            style,
            dry_run: false,
            other_end: OtherEnd::Server,
        }
    }

    fn settled(kind: Kind, result: Settled) -> Event {
        Event::Settled {
            id: Some(1),
            path: RelativePath::from_components(["a"]).unwrap(),
            kind,
            size: 0,
            result,
        }
    }

    #[test]
    fn a_lost_connection_takes_one_line_and_none_when_quiet() {
        let lost = Event::Lost {
            reason: "the peer has restarted".into(),
            retry_for: Duration::from_secs(600),
        };
        assert_eq!(
            line_of(&lost, display(Style::Normal)).unwrap(),
            "haul: connection lost (the peer has restarted); trying again, for 10 min at most"
        );
        assert_eq!(line_of(&lost, display(Style::Quiet)), None);
        let waiting = Event::Reconnecting {
            attempt: 2,
            wait: Duration::from_millis(730),
        };
        assert_eq!(line_of(&waiting, display(Style::Normal)), None);
        assert_eq!(
            line_of(&waiting, display(Style::Verbose)).unwrap(),
            "trying again in 0.7 s (attempt 2)"
        );
    }

    #[test]
    fn a_sender_waits_for_its_receiver_to_come_back() {
        let sending = Display {
            other_end: OtherEnd::Receiver,
            ..display(Style::Normal)
        };
        let lost = Event::Lost {
            reason: "timed out".into(),
            retry_for: Duration::from_secs(90),
        };
        assert_eq!(
            line_of(&lost, sending).unwrap(),
            "haul: lost the receiver (timed out); waiting for it, for 90 s at most"
        );
    }

    #[test]
    fn each_style_shows_the_results_that_it_should() {
        let failed = || Settled::Failed(Code::NoSpace.into());
        let vanished = || Settled::Omitted(Code::Vanished.into());
        let special = || Settled::Omitted(Code::Special.into());
        let shown = |kind, result| {
            let event = settled(kind, result);
            [Style::Quiet, Style::Normal, Style::Verbose]
                .map(|style| line_of(&event, display(style)).is_some())
        };
        assert_eq!(shown(Kind::File, failed()), [true, true, true]);
        assert_eq!(shown(Kind::File, vanished()), [true, true, true]);
        assert_eq!(shown(Kind::File, special()), [false, true, true]);
        for kind in [Kind::File, Kind::Directory] {
            assert_eq!(shown(kind, Settled::Committed), [false, false, true]);
        }
        assert_eq!(shown(Kind::File, Settled::Skipped), [false, false, true]);
        assert_eq!(
            shown(Kind::Directory, Settled::Skipped),
            [false, false, false]
        );
    }

    #[test]
    fn a_dry_run_names_files_to_copy_and_paths_to_remove() {
        let dry_run = |style| Display {
            dry_run: true,
            ..display(style)
        };
        let file = settled(Kind::File, Settled::Committed);
        let directory = settled(Kind::Directory, Settled::Committed);
        let removed = Event::Removed {
            path: RelativePath::from_components(["b"]).unwrap(),
        };
        let line = |event, style| line_of(event, dry_run(style));
        assert_eq!(line(&file, Style::Normal).unwrap(), "would copy a");
        assert_eq!(line(&directory, Style::Verbose), None);
        assert_eq!(line(&removed, Style::Normal).unwrap(), "would remove b");
        assert_eq!(line(&file, Style::Quiet), None);
        assert_eq!(line(&removed, Style::Quiet), None);
    }
}
