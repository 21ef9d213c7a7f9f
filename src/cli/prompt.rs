//! The prompt for a code. Tab completes words.

use std::io::IsTerminal;

use haul::pairing::code;
use rustyline::completion::Completer;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::MemHistory;
use rustyline::validate::Validator;
use rustyline::{Behavior, Config, Context, Editor, Helper};

use super::output;

/// Asks for a code on the terminal, or reads a line of standard input. Returns `None` at the end of input, or for Ctrl-C.
/// Blocks.
pub(crate) fn ask_for_code(question: &str) -> Option<String> {
    if !std::io::stdin().is_terminal() {
        return output::read_line();
    }
    // Uses the terminal itself, because standard output may be a file, and the code is a secret.
    let config = Config::builder().behavior(Behavior::PreferTerm).build();
    let mut editor = Editor::<Words, MemHistory>::with_history(config, MemHistory::new()).ok()?;
    editor.set_helper(Some(Words));
    // Ctrl-C and Ctrl-D are errors, which become `None`.
    editor.readline(question).ok()
}

/// Completes the word at the cursor.
struct Words;

impl Completer for Words {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        at: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        Ok(complete(&line[..at]))
    }
}

impl Hinter for Words {
    type Hint = String;
}

impl Highlighter for Words {}
impl Validator for Words {}
impl Helper for Words {}

/// Returns the start of the last word, and its completions. The number cannot be completed.
fn complete(line: &str) -> (usize, Vec<String>) {
    let start = line.rfind(|c: char| !c.is_alphanumeric()).map_or(0, |at| {
        at + line[at..].chars().next().map_or(1, char::len_utf8)
    });
    let begun = line[start..].to_lowercase();
    if start == 0 || begun.is_empty() {
        return (start, Vec::new());
    }
    let parts = line[..start]
        .split(|c: char| !c.is_alphanumeric())
        .filter(|part| !part.is_empty())
        .count();
    let end = if parts < code::WORDS { "-" } else { "" };
    let words = code::list().iter().filter(|word| word.starts_with(&begun));
    (start, words.map(|word| format!("{word}{end}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_completed_and_numbers_are_not() {
        assert_eq!(complete("417-map"), (4, vec!["maple-".into()]));
        assert_eq!(
            complete("417 MAPLE CAN"),
            (
                10,
                [
                    "can-", "canal-", "cancel-", "candy-", "cannon-", "canoe-", "canvas-",
                    "canyon-"
                ]
                .map(String::from)
                .to_vec()
            )
        );
        assert_eq!(complete("417-maple-canyon-orb"), (17, vec!["orbit".into()]));
        for line in ["", "4", "417", "417-", "417-zzz", "417\u{2013}"] {
            assert_eq!(complete(line).1, Vec::<String>::new(), "{line}");
        }
    }
}
