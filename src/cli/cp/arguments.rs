//! The arguments of a copy: which are local, which are on a server, and so its direction.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use haul::{Argument, Error, Host, RelativePath, Target};

use crate::cli::output::printable_path;

/// A copy between this machine and one server.
#[derive(Debug)]
pub(super) struct Arguments {
    pub(super) server: Target,
    pub(super) direction: Direction,
}

/// The direction of a copy, and what is on this machine.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Push(Vec<PathBuf>),
    /// Sends standard input.
    PushInput,
    Pull {
        sources: Vec<RelativePath>,
        destination: PathBuf,
    },
    /// Writes one file to standard output.
    PullToOutput(RelativePath),
}

impl Direction {
    /// Whether the only source is a local directory.
    pub(super) fn is_of_one_directory(&self) -> bool {
        matches!(self, Self::Push(sources) if matches!(&sources[..], [source] if source.is_dir()))
    }
}

impl Arguments {
    /// Sorts the arguments. With `json`, standard output is taken.
    ///
    /// # Errors
    /// [`Error::Usage`] when an argument is invalid, or there is no copy between this machine and one server.
    pub(super) fn parse(
        sources: &[OsString],
        destination: &OsStr,
        json: bool,
    ) -> Result<Self, Error> {
        let mut local = Vec::new();
        let mut remote = Vec::<Target>::new();
        for source in sources {
            match Argument::parse(source)? {
                Argument::Local(path) => local.push(path),
                Argument::Remote(target) => remote.push(target),
            }
        }
        let from_input = is_input(sources)?;
        match (Argument::parse(destination)?, remote.first().cloned()) {
            (Argument::Remote(server), None) => push(local, server, from_input),
            (Argument::Remote(_), Some(first)) => Err(between_servers(&first, &sources[0])),
            (Argument::Local(path), None) => {
                let path = printable_path(&path);
                let example = path.trim_start_matches(['.', '/']);
                Err(usage(format!(
                    "cannot copy between local paths: {path} is not a server; the destination comes last, as in haul://host/{example}"
                )))
            }
            (Argument::Local(_), Some(_)) if !local.is_empty() => {
                let local = printable_path(&local[0]);
                Err(usage(format!(
                    "cannot copy {local}: it is local, and the other sources are on a server; copy it with cp"
                )))
            }
            (Argument::Local(path), Some(server)) => pull(server, remote, path, json),
        }
    }
}

/// Whether the source is standard input.
fn is_input(sources: &[OsString]) -> Result<bool, Error> {
    match sources.iter().any(|source| source == "-") {
        true if sources.len() > 1 => Err(usage(
            "cannot send - with other sources: it is standard input; write a file of that name as ./-",
        )),
        input => Ok(input),
    }
}

fn push(local: Vec<PathBuf>, server: Target, from_input: bool) -> Result<Arguments, Error> {
    if from_input && server.into {
        return Err(usage(format!(
            "cannot send standard input without a name: write {server}name.tar"
        )));
    }
    Ok(Arguments {
        server,
        direction: match from_input {
            true => Direction::PushInput,
            false => Direction::Push(local),
        },
    })
}

fn pull(
    server: Target,
    remote: Vec<Target>,
    destination: PathBuf,
    json: bool,
) -> Result<Arguments, Error> {
    if let Some(other) = remote.iter().find(|target| target.host != server.host) {
        let one = &server.host;
        let other = &other.host;
        return Err(usage(format!(
            "cannot copy from {one} and {other} at once: they are two servers; copy from one after the other"
        )));
    }
    let mut sources: Vec<_> = remote.into_iter().map(|target| target.path).collect();
    let direction = if destination.as_os_str() != "-" {
        Direction::Pull {
            sources,
            destination,
        }
    } else if json {
        return Err(usage(
            "cannot use --json and - together: both write to standard output; leave out one of them",
        ));
    } else {
        match sources
            .pop()
            .filter(|one| sources.is_empty() && !one.is_root())
        {
            Some(source) => Direction::PullToOutput(source),
            None => {
                return Err(usage(
                    "cannot write a directory or several sources to -: it takes one file; write a directory named - as ./-",
                ));
            }
        }
    };
    Ok(Arguments { server, direction })
}

fn between_servers(first: &Target, first_source: &OsStr) -> Error {
    let why = "cannot copy from server to server: run haul on one of the two, with a local path";
    match first.host {
        // A local file may have a colon in its name.
        Host::Peer(_) => {
            let shown = printable_path(first_source.as_ref());
            usage(format!(
                "{why}. If {shown} is a local file, write ./{shown}"
            ))
        }
        Host::Address { .. } => usage(why),
    }
}

fn usage(why: impl Into<String>) -> Error {
    Error::Usage(why.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str], json: bool) -> Result<Direction, String> {
        let mut sources: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        let destination = sources.pop().unwrap();
        let parsed = Arguments::parse(&sources, &destination, json);
        parsed
            .map(|arguments| arguments.direction)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_side_of_the_server_decides_the_direction() {
        let path = |name: &str| RelativePath::from_components([name]).unwrap();
        assert_eq!(
            parse(&["a", "b", "haul://h/"], false),
            Ok(Direction::Push(vec!["a".into(), "b".into()]))
        );
        assert_eq!(parse(&["-", "haul://h/a"], true), Ok(Direction::PushInput));
        assert_eq!(
            parse(&["haul://h/a", "haul://h/b", "there"], true),
            Ok(Direction::Pull {
                sources: vec![path("a"), path("b")],
                destination: "there".into()
            })
        );
        assert_eq!(
            parse(&["haul://h/a", "-"], false),
            Ok(Direction::PullToOutput(path("a")))
        );
    }

    #[test]
    fn copies_without_exactly_one_server_are_refused() {
        for (arguments, why) in [
            (&["a", "b"][..], "cannot copy between local paths: b"),
            (
                &["haul://h/a", "haul://i/"],
                "cannot copy from server to server",
            ),
            (&["bob:a", "haul://i/"], "cannot copy from server to server"),
            (
                &["haul://h/a", "haul://i/b", "c"],
                "cannot copy from h and i at once",
            ),
            (&["haul://h/a", "b", "c"], "cannot copy b: it is local"),
        ] {
            let error = parse(arguments, false).unwrap_err();
            assert!(error.starts_with(why), "{error}");
        }
        let peer = parse(&["bob:a", "haul://i/"], false).unwrap_err();
        assert!(
            peer.ends_with("If bob:a is a local file, write ./bob:a"),
            "{peer}"
        );
    }

    #[test]
    fn a_pipe_carries_one_file() {
        for (arguments, why) in [
            (
                &["-", "a", "haul://h/"][..],
                "cannot send - with other sources",
            ),
            (
                &["-", "haul://h/"],
                "cannot send standard input without a name",
            ),
            (
                &["haul://h/a", "haul://h/b", "-"],
                "cannot write a directory",
            ),
            (&["haul://h/", "-"], "cannot write a directory"),
        ] {
            let error = parse(arguments, false).unwrap_err();
            assert!(error.starts_with(why), "{error}");
        }
        let json = parse(&["haul://h/a", "-"], true).unwrap_err();
        assert!(
            json.starts_with("cannot use --json and - together"),
            "{json}"
        );
    }
}
