//! The exit codes of the command.

use haul::{Code, Error, Outcome};

/// Everything was done.
pub(crate) const DONE: u8 = 0;
/// Some files failed; each was reported with its reason.
pub(crate) const FAILED: u8 = 1;
/// The command line is invalid, or a file of HAUL_HOME cannot be used.
pub(crate) const USAGE: u8 = 2;
/// No connection could be made, or it was lost and not made again in time.
pub(crate) const NO_CONNECTION: u8 = 3;
/// The server is not trusted, or it does not admit this machine's key.
pub(crate) const NOT_TRUSTED: u8 = 4;
/// Everything was done except for sources that vanished before their turn. rsync uses the same number.
pub(crate) const VANISHED: u8 = 24;
/// Ctrl-C ended the command: 128 plus the number of SIGINT, as in shells.
pub(crate) const INTERRUPTED: u8 = 130;

/// Returns the exit code of a session that ran to its end.
pub(crate) fn code_of_outcome(outcome: &Outcome) -> u8 {
    let Outcome { sent, summary, .. } = outcome;
    let failed = sent.failed > 0 || sent.interrupted.is_some() || summary.unremoved.is_some();
    match sent.vanished {
        _ if failed => FAILED,
        0 => DONE,
        _ => VANISHED,
    }
}

/// Returns the exit code of an error that ended the command.
pub(crate) fn code_of_error(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<Error>() {
        Some(Error::Usage(_) | Error::Home { .. } | Error::Internal(_) | Error::NoRandomness) => {
            USAGE
        }
        Some(
            Error::Resolve { .. } | Error::Unreachable { .. } | Error::Lost(_) | Error::Stopping,
        ) => NO_CONNECTION,
        Some(
            Error::UnknownHost { .. }
            | Error::ChangedHost { .. }
            | Error::WrongPin { .. }
            | Error::NotTrusted { .. }
            | Error::NotAdmitted(_),
        ) => NOT_TRUSTED,
        Some(Error::Refused(why)) if matches!(why.code, Code::NotAllowed | Code::NotAdmitted) => {
            NOT_TRUSTED
        }
        Some(Error::Refused(why)) if why.code == Code::Busy => NO_CONNECTION,
        _ => FAILED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_exit_codes_that_the_help_lists() {
        let code = |error: Error| code_of_error(&anyhow::Error::from(error));
        assert_eq!(code(Error::Usage(String::new())), USAGE);
        assert_eq!(code(Error::Internal("continue")), USAGE);
        assert_eq!(code(Error::Lost("".into())), NO_CONNECTION);
        assert_eq!(
            code(Error::Resolve {
                host: "h".into(),
                why: "".into()
            }),
            NO_CONNECTION
        );
        assert_eq!(
            code(Error::NotAdmitted(Code::NotAdmitted.into())),
            NOT_TRUSTED
        );
        assert_eq!(code(Error::Refused(Code::NotAllowed.into())), NOT_TRUSTED);
        assert_eq!(code(Error::Refused(Code::NoSpace.into())), FAILED);
        assert_eq!(code_of_error(&anyhow::anyhow!("other")), FAILED);
    }

    #[test]
    fn vanished_sources_have_a_code_of_their_own() {
        let mut outcome = Outcome::default();
        assert_eq!(code_of_outcome(&outcome), DONE);
        outcome.sent.vanished = 1;
        assert_eq!(code_of_outcome(&outcome), VANISHED);
        outcome.sent.failed = 1;
        assert_eq!(code_of_outcome(&outcome), FAILED);
    }
}
