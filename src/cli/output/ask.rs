//! Asks the user on the terminal.

use std::io::{IsTerminal, Write};

/// Whether standard input and standard error are terminals, so that a question can be asked.
pub(crate) fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks on the terminal. Returns `None` without a terminal, or at the end of input (Ctrl-D).
pub(crate) fn ask(question: &str) -> Option<String> {
    if !can_ask() {
        return None;
    }
    let mut output = std::io::stderr();
    write!(output, "{question} ")
        .and_then(|()| output.flush())
        .ok()?;
    read_line().map(|answer| answer.trim().to_owned())
}

/// Reads a line of standard input. Returns `None` at its end.
pub(crate) fn read_line() -> Option<String> {
    let mut line = String::new();
    let read = std::io::stdin().read_line(&mut line).ok()?;
    (read > 0).then_some(line)
}
