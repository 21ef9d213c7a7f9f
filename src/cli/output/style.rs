//! How a command prints.

/// How much a command prints, and in which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// Failures only (`--quiet`).
    Quiet,
    /// Results and failures, and progress on a terminal.
    Normal,
    /// Each file as well, and the statistics of the path (`--verbose`).
    Verbose,
    /// One JSON object a line on standard output (`--json`).
    Json,
}

/// The other end of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OtherEnd {
    Server,
    Sender,
    Receiver,
}

impl OtherEnd {
    /// Returns its name in messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Server => "the server",
            Self::Sender => "the sender",
            Self::Receiver => "the receiver",
        }
    }
}

/// How a session is shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Display {
    pub(crate) style: Style,
    /// Whether the events report what would be done.
    pub(crate) dry_run: bool,
    pub(crate) other_end: OtherEnd,
}
