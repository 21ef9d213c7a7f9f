//! The filter options of commands that walk a tree.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, value_parser};
use haul::internal::storage::filter::lines;
use haul::{Error, Filter, Only, Rules, printable};

/// The filter options as typed. Implemented by hand, because clap's derive loses the order of different options.
#[derive(Debug, Clone, Default)]
pub(crate) struct FilterArgs {
    rules: Vec<Given>,
    gitignore: bool,
    files_from: Option<PathBuf>,
    from0: bool,
}

#[derive(Debug, Clone)]
enum Given {
    Rule(Vec<u8>),
    File(PathBuf),
}

const INCLUDE: &str = "include";
const EXCLUDE: &str = "exclude";
const EXCLUDE_FROM: &str = "exclude-from";
const GITIGNORE: &str = "gitignore";
const FILES_FROM: &str = "files-from";
const FROM0: &str = "from0";

impl Args for FilterArgs {
    fn augment_args(command: Command) -> Command {
        let option = |name: &'static str, value: &'static str| {
            let action = if name == FILES_FROM {
                ArgAction::Set
            } else {
                ArgAction::Append
            };
            // Hidden, because the help must fit on a screen. Its last lines name them.
            Arg::new(name)
                .long(name)
                .value_name(value)
                .action(action)
                .hide(true)
                .allow_hyphen_values(name != EXCLUDE_FROM)
        };
        let flag = |name: &'static str| {
            Arg::new(name)
                .long(name)
                .action(ArgAction::SetTrue)
                .hide(true)
        };
        command
            .arg(option(INCLUDE, "GLOB").value_parser(value_parser!(OsString)))
            .arg(option(EXCLUDE, "GLOB").value_parser(value_parser!(OsString)))
            .arg(option(EXCLUDE_FROM, "FILE").value_parser(value_parser!(PathBuf)))
            .arg(option(FILES_FROM, "FILE").value_parser(value_parser!(PathBuf)))
            .arg(flag(GITIGNORE))
            .arg(flag(FROM0).short('0').requires(FILES_FROM))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for FilterArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = Vec::new();
        for (name, before) in [(EXCLUDE, &b""[..]), (INCLUDE, b"!")] {
            let globs = matches.get_many::<OsString>(name).into_iter().flatten();
            let rules = globs.map(|glob| Given::Rule([before, glob.as_bytes()].concat()));
            given.extend(matches.indices_of(name).into_iter().flatten().zip(rules));
        }
        let files = matches
            .get_many::<PathBuf>(EXCLUDE_FROM)
            .into_iter()
            .flatten()
            .cloned()
            .map(Given::File);
        given.extend(
            matches
                .indices_of(EXCLUDE_FROM)
                .into_iter()
                .flatten()
                .zip(files),
        );
        given.sort_by_key(|(index, _)| *index);
        Ok(Self {
            rules: given.into_iter().map(|(_, given)| given).collect(),
            gitignore: matches.get_flag(GITIGNORE),
            files_from: matches.get_one(FILES_FROM).cloned(),
            from0: matches.get_flag(FROM0),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl FilterArgs {
    /// Builds the filter. With `--files-from`, listed directories are entered only if `recursive`.
    ///
    /// # Errors
    /// [`Error::Usage`] when a file cannot be read, or a rule or a name is invalid.
    pub(crate) fn filter(&self, recursive: bool) -> anyhow::Result<Filter> {
        let mut rules = Vec::new();
        for given in &self.rules {
            match given {
                Given::Rule(rule) => rules.push(rule.clone()),
                Given::File(path) => rules.extend(lines(&read(path)?)),
            }
        }
        let rules = Rules::new(rules).map_err(|bad| {
            Error::Usage(format!(
                "cannot use a rule of --exclude or --include: {bad}"
            ))
        })?;
        let only = match &self.files_from {
            Some(path) => Some(Only::parse(&read(path)?, self.from0, recursive).map_err(
                |(name, bad)| {
                    Error::Usage(format!(
                        "cannot use {}: {}: {bad}",
                        printable(path.as_os_str().as_bytes()),
                        printable(&name)
                    ))
                },
            )?),
            None => None,
        };
        Ok(Filter {
            rules,
            gitignore: self.gitignore,
            only,
        })
    }

    /// Whether `--files-from` was given.
    pub(crate) fn has_list(&self) -> bool {
        self.files_from.is_some()
    }
}

/// Reads a file, or standard input for `-`.
fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut text = Vec::new();
    let read = match path.as_os_str().as_bytes() {
        b"-" => std::io::stdin().read_to_end(&mut text).map(|_| text),
        _ => std::fs::read(path),
    };
    let shown = printable(path.as_os_str().as_bytes());
    Ok(read.map_err(|error| Error::Usage(format!("cannot read {shown}: {error}")))?)
}
