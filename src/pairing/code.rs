//! Short codes: a number under which the sender is found, and words that are the secret.

use std::fmt;
use std::str::FromStr;

use bip39::Language;

use crate::auth::identity::KeyId;
use crate::auth::random::random;
use crate::error::Result;
use crate::error::text::printable;

/// Words in a code. Each is one of the 2,048 of BIP-39's English list and carries 11 bits, so a code has 33 bits. One guess is
/// right with a chance of 1 in 8.6 thousand million, and a wrong guess burns the code.
pub const WORDS: usize = 3;
/// Numbers that this machine draws. They are no secret, and three digits are easy to say. Relays give higher numbers.
const NUMBERS: std::ops::Range<u32> = 100..1000;
/// Highest valid number. Relays and paired machines use longer numbers because many share them.
const MAX_NUMBER: u32 = 99_999_999;

/// A code such as `417-maple-canyon-orbit`. Its words are never sent, and its `Debug` does not show them.
#[derive(Clone, PartialEq, Eq)]
pub struct ShortCode {
    number: u32,
    words: [&'static str; WORDS],
}

impl ShortCode {
    /// Draws a random code. Number and words are independent.
    ///
    /// # Errors
    /// [`Error::NoRandomness`](crate::error::Error::NoRandomness).
    pub fn draw() -> Result<Self> {
        let number = u32::from_le_bytes(random()?);
        // The slight bias of the remainder does no harm: the number is public.
        Self::draw_at(NUMBERS.start + number % (NUMBERS.end - NUMBERS.start))
    }

    /// Draws a code with a number that a relay has given.
    ///
    /// # Errors
    /// As [`draw`](Self::draw).
    pub fn draw_at(number: u32) -> Result<Self> {
        let words: [u8; 2 * WORDS] = random()?;
        // 2,048 divides 65,536, so all words are equally likely.
        let word = |i: usize| {
            usize::from(u16::from_le_bytes([words[2 * i], words[2 * i + 1]])) % list().len()
        };
        Ok(Self {
            number,
            words: std::array::from_fn(|i| list()[word(i)]),
        })
    }

    /// The number under which the sender is found. It is public.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Whether a relay has given the number.
    pub fn is_of_relay(&self) -> bool {
        self.number >= NUMBERS.end
    }

    /// The password of the exchange.
    fn secret(&self) -> String {
        self.words.join("-")
    }
}

/// The number and secret by which two ends find and recognise each other.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    /// The number under which the sender is found.
    pub(super) number: u32,
    /// The password of the exchange.
    pub(super) secret: String,
    /// The other end's key, if it is known. Any other key is then refused.
    pub(super) key_id: Option<KeyId>,
}

impl Credential {
    /// The number under which the sender is found. It is public.
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

/// All words of codes, in alphabetical order. No two begin with the same four letters.
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

/// Words that users copy along with a code or a ticket: `Code: ` before it, or the command that it followed.
const LABELS: [&str; 4] = ["code", "ticket", "haul", "receive"];

/// Removes from a pasted line what surrounds the code or ticket: quotes, a prompt, a full stop, `Code: `, `haul receive `.
/// A text without a label is only trimmed.
///
/// ```
/// use haul::pairing::code::without_label;
///
/// assert_eq!(without_label("$ haul receive 417-maple-canyon-orbit\n"), "417-maple-canyon-orbit");
/// ```
pub fn without_label(text: &str) -> &str {
    let is_separator = |c: char| !c.is_alphanumeric();
    let mut rest = text.trim_matches(is_separator);
    loop {
        let end = rest.find(is_separator).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        // A ticket begins with `HAUL:`.
        let is_ticket = word.eq_ignore_ascii_case("haul") && after.starts_with(':');
        let is_label = LABELS.iter().any(|label| label.eq_ignore_ascii_case(word));
        if is_ticket || !is_label {
            return rest;
        }
        rest = after.trim_start_matches(is_separator);
    }
}

/// Why a text is not a code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCode {
    /// It does not have the form of a code.
    #[error("a code is a number and {WORDS} words, as in 417-maple-canyon-orbit")]
    Form,
    /// A word that is not in the list: it was misheard or mistyped.
    #[error("no code has the word {0}; ask for it again, or press Tab at the prompt for the words")]
    Word(String),
}

impl FromStr for ShortCode {
    type Err = BadCode;

    /// Reads a code. Case, separators and labels (see [`without_label`]) do not matter; the words must be in the list.
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
    fn a_code_has_over_thirty_secret_bits_and_reads_back() {
        assert!((list().len() as f64).log2() * WORDS as f64 >= 30.0);
        assert!(list().is_sorted());
        for _ in 0..100 {
            let code = ShortCode::draw().unwrap();
            assert!(NUMBERS.contains(&code.number()));
            assert_eq!(code.to_string().parse(), Ok(code));
        }
    }

    #[test]
    fn case_and_separators_do_not_matter_but_words_do() {
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
    fn a_ticket_can_be_pasted_with_its_command() {
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
    fn debug_output_does_not_show_the_words() {
        let code: ShortCode = "417-maple-canyon-orbit".parse().unwrap();
        assert_eq!(format!("{code:?}"), "ShortCode(417-...)");
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".*") {
            let _ = text.parse::<ShortCode>();
        }
    }
}
