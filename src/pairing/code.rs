//! The code that one person reads to another: a number that names the meeting place, and words that are the secret.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::rand;
use bip39::Language;

use crate::auth::identity::KeyId;
use crate::error::text::printable;
use crate::error::{Error, Result};

/// Words of a code. Each is one of 2,048 of BIP-39's English list, so 11 bits, and all are 33: a single guess is right once
/// in 8.6 thousand million times, and a wrong one burns the code.
pub const WORDS: usize = 3;
/// Numbers that are drawn: three digits, as they are easily said and are no secret. Those that relays give are higher.
const NUMBERS: std::ops::Range<u32> = 100..1000;
/// Highest number that is understood, so that a meeting place that is shared by many can draw longer ones.
const MAX_NUMBER: u32 = 99_999_999;

/// A code such as `417-maple-canyon-orbit`. Its words never travel; its `Debug` does not show them.
#[derive(Clone, PartialEq, Eq)]
pub struct ShortCode {
    number: u32,
    words: [&'static str; WORDS],
}

impl ShortCode {
    /// A code that nobody can foresee. The number says nothing of the words.
    ///
    /// # Errors
    /// [`Error::Usage`] when the system gives no random numbers.
    pub fn draw() -> Result<Self> {
        let mut number = [0; 4];
        fill(&mut number)?;
        // That the numbers are not quite as likely does no harm.
        Self::draw_at(NUMBERS.start + u32::from_le_bytes(number) % (NUMBERS.end - NUMBERS.start))
    }

    /// The same at a meeting place that has given the number.
    ///
    /// # Errors
    /// As [`draw`](Self::draw).
    pub fn draw_at(number: u32) -> Result<Self> {
        let mut words = [0; 2 * WORDS];
        fill(&mut words)?;
        // 2,048 divides 65,536, so that all words are as likely.
        let word = |i: usize| {
            usize::from(u16::from_le_bytes([words[2 * i], words[2 * i + 1]])) % list().len()
        };
        Ok(Self {
            number,
            words: std::array::from_fn(|i| list()[word(i)]),
        })
    }

    /// Names the meeting place; anybody may know it.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Whether a relay has given the number.
    pub fn is_of_relay(&self) -> bool {
        self.number >= NUMBERS.end
    }

    /// What both must know.
    fn secret(&self) -> String {
        self.words.join("-")
    }
}

/// How two ends find each other and know that they are the right ones.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    /// Names the meeting place.
    pub(super) number: u32,
    /// What both must know.
    pub(super) secret: String,
    /// The key of the other end, where it is known; nobody else is listened to then.
    pub(super) key_id: Option<KeyId>,
}

impl Credential {
    /// Names the meeting place; anybody may know it.
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl From<&ShortCode> for Credential {
    fn from(code: &ShortCode) -> Self {
        Self {
            number: code.number,
            secret: code.secret(),
            key_id: None,
        }
    }
}

fn fill(random: &mut [u8]) -> Result<()> {
    rand::fill(random).map_err(|_| Error::Usage("the system gives no random numbers".into()))
}

/// All words that a code may have, in alphabetical order. No two begin with the same four letters.
pub fn list() -> &'static [&'static str; 2048] {
    Language::English.word_list()
}

impl fmt::Display for ShortCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.number, self.secret())
    }
}

impl fmt::Debug for ShortCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShortCode({}-...)", self.number)
    }
}

/// What people copy along with a code or a ticket: `Code: ` before it, or the command that it was typed behind.
const LABELS: [&str; 4] = ["code", "ticket", "haul", "receive"];

/// A pasted line without what stands around the code or ticket in it: quotes, a prompt, a full stop, `Code: `,
/// `haul receive `. A text without a label is only trimmed.
///
/// ```
/// use haul::pairing::code::without_label;
///
/// assert_eq!(without_label("$ haul receive 417-maple-canyon-orbit\n"), "417-maple-canyon-orbit");
/// ```
pub fn without_label(text: &str) -> &str {
    let between = |c: char| !c.is_alphanumeric();
    let mut rest = text.trim_matches(between);
    loop {
        let end = rest.find(between).unwrap_or(rest.len());
        let (word, behind) = rest.split_at(end);
        // `HAUL:` is what a ticket begins with.
        let ticket = word.eq_ignore_ascii_case("haul") && behind.starts_with(':');
        let label = LABELS.iter().any(|label| label.eq_ignore_ascii_case(word));
        if ticket || !label {
            return rest;
        }
        rest = behind.trim_start_matches(between);
    }
}

/// Why something is no code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCode {
    /// It has another form.
    #[error("a code is a number and {WORDS} words, as in 417-maple-canyon-orbit")]
    Form,
    /// A word that no code has: it was misheard or mistyped.
    #[error(
        "no code has the word {0}; ask for it again, or press Tab at the prompt for what there is"
    )]
    Word(String),
}

impl FromStr for ShortCode {
    type Err = BadCode;

    /// Case does not matter, nor what stands between the parts, nor what is copied along with it (see [`without_label`]). A
    /// word must be right.
    fn from_str(text: &str) -> Result<Self, BadCode> {
        let parts: Vec<_> = without_label(text)
            .split(|c: char| !c.is_alphanumeric())
            .filter(|part| !part.is_empty())
            .collect();
        let [number, words @ ..] = &parts[..] else {
            return Err(BadCode::Form);
        };
        let number = number
            .parse()
            .ok()
            .filter(|number| *number <= MAX_NUMBER)
            .ok_or(BadCode::Form)?;
        let words: [&str; WORDS] = words.try_into().map_err(|_| BadCode::Form)?;
        let mut known = [""; WORDS];
        for (known, word) in known.iter_mut().zip(words) {
            let lower = word.to_lowercase();
            let at = list().binary_search(&lower.as_str());
            *known = list()[at.map_err(|_| BadCode::Word(printable(word.as_bytes())))?];
        }
        Ok(Self {
            number,
            words: known,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_code_has_thirty_bits_of_secret_and_is_read_as_it_is_written() {
        assert!((list().len() as f64).log2() * WORDS as f64 >= 30.0);
        assert!(list().is_sorted());
        for _ in 0..100 {
            let code = ShortCode::draw().unwrap();
            assert!(NUMBERS.contains(&code.number()));
            assert_eq!(code.to_string().parse(), Ok(code));
        }
    }

    #[test]
    fn case_spaces_and_separators_are_forgiven_and_words_are_not() {
        let code: ShortCode = "417-maple-canyon-orbit".parse().unwrap();
        for text in [
            "417 maple canyon orbit",
            " 417-Maple_CANYON.orbit\n",
            "417--maple, canyon/orbit",
            "0417-maple-canyon-orbit",
            "Code: 417-maple-canyon-orbit",
            "CODE 417-MAPLE-CANYON-ORBIT \r\n",
            "haul receive 417-maple-canyon-orbit",
            "$ haul receive Code: 417 maple canyon orbit",
            "417\u{2013}maple\u{2014}canyon\u{2011}orbit.",
            "417\u{2212}maple\tcanyon\u{a0}orbit",
            "\u{feff}\u{201c}417-maple-canyon-orbit\u{201d}",
        ] {
            assert_eq!(text.parse(), Ok(code.clone()), "{text}");
        }
        assert_eq!(
            "417-mapel-canyon-orbit".parse::<ShortCode>(),
            Err(BadCode::Word("mapel".into()))
        );
        assert_eq!(
            "417-mapl-canyon-orbit".parse::<ShortCode>(),
            Err(BadCode::Word("mapl".into()))
        );
        for text in [
            "",
            "417",
            "maple-canyon-orbit",
            "417-maple-canyon",
            "417-maple-canyon-orbit-orbit",
            "417maple canyon orbit",
            "Code:",
            "haul receive",
            "Code: 418 is 417-maple-canyon-orbit",
        ] {
            assert_eq!(text.parse::<ShortCode>(), Err(BadCode::Form), "{text}");
        }
    }

    #[test]
    fn a_ticket_is_pasted_with_its_command() {
        for text in [
            "HAUL:ABC",
            "haul receive HAUL:ABC",
            " $ haul receive \"HAUL:ABC\"\n",
            "Ticket: HAUL:ABC",
        ] {
            assert_eq!(without_label(text), "HAUL:ABC", "{text}");
        }
        assert_eq!(without_label("haul receive haul:abc"), "haul:abc");
    }

    #[test]
    fn no_log_shows_the_words() {
        let code: ShortCode = "417-maple-canyon-orbit".parse().unwrap();
        assert_eq!(format!("{code:?}"), "ShortCode(417-...)");
    }

    proptest! {
        #[test]
        fn whatever_is_typed_is_no_panic(text in ".*") {
            let _ = text.parse::<ShortCode>();
        }
    }
}
