//! Writes lines to standard output and standard error. Errors are ignored, because the reader of a pipe may have closed it.

use std::io::Write;
use std::os::fd::AsFd;

use haul::Error;
use serde_json::Value;

use super::json;

/// Prints a line on standard output.
pub(crate) fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Prints a line on standard error.
pub(crate) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Prints a JSON object as a line on standard output.
pub(crate) fn json_line(object: &Value) {
    line(&json::to_text(object));
}

/// Prints the error that ended the command.
pub(crate) fn failure(error: &anyhow::Error) {
    // The outermost context is the whole message. The inner error only chooses the exit code.
    note(&format!("haul: {error}"));
}

/// Prints the error as JSON, if that was asked for and no session began. [`failure`] prints the same error as text.
pub(crate) fn report_start_failure(json: bool, error: &anyhow::Error) {
    if json {
        json_line(&json::error(error));
    }
}

/// Returns standard output for the content of a file, without a buffer.
///
/// # Errors
/// [`Error::Io`] when the descriptor cannot be duplicated.
pub(crate) fn unbuffered_standard_output() -> Result<std::fs::File, Error> {
    let output = std::io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(Error::io("cannot open standard output"))?;
    Ok(output.into())
}
