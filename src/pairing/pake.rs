//! Two ends find out whether they know the same words, and nobody else learns anything about them.
//!
//! SPAKE2 (RFC 9382, in the form of the crate spake2) within an established TLS connection. Whoever sits in the middle has two
//! connections with different exporters (RFC 8446, section 7.5), so that the exchange fails on both; whoever guesses has one
//! guess, since a key confirms it and says nothing of any other. No room but this knows which exchange it is.

use blake3::Hasher;
use quinn::Connection;
use spake2::{Ed25519Group, Identity, Password, Spake2};

use super::code::Credential;
use crate::auth::identity::KeyId;

/// Length of either side's message in bytes.
pub(super) const MESSAGE: usize = 33;
const EXPORTER: &[u8] = b"EXPORTER-haul-code";
const TRANSCRIPT: &str = "haul/1 code: transcript";
const CONFIRM_SENDER: &str = "haul/1 code: the sender confirms";
const CONFIRM_RECEIVER: &str = "haul/1 code: the receiver confirms";
const PAIR: &str = "haul/1 code: a pair";

/// Who takes part, and over which connection.
#[derive(Debug, Clone)]
pub(super) struct Parties {
    pub(super) sender: KeyId,
    pub(super) receiver: KeyId,
    /// Keying material of the connection that only its two ends have.
    pub(super) exported: [u8; 32],
}

impl Parties {
    /// Those of a connection; `None` before its handshake is over.
    pub(super) fn of(connection: &Connection, sender: KeyId, receiver: KeyId) -> Option<Self> {
        let mut exported = [0; 32];
        connection
            .export_keying_material(&mut exported, EXPORTER, b"")
            .ok()?;
        Some(Self {
            sender,
            receiver,
            exported,
        })
    }
}

/// Which end this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Sender,
    Receiver,
}

/// An exchange whose first message is made.
pub(super) struct Exchange {
    role: Role,
    state: Spake2<Ed25519Group>,
    transcript: Hasher,
    message: [u8; MESSAGE],
}

impl Exchange {
    /// Begins an exchange; the message is for the other end.
    pub(super) fn begin(
        role: Role,
        credential: &Credential,
        parties: &Parties,
    ) -> (Self, [u8; MESSAGE]) {
        let mut transcript = Hasher::new_derive_key(TRANSCRIPT);
        transcript
            .update(crate::protocol::ALPN)
            .update(&credential.number.to_le_bytes());
        transcript
            .update(&parties.sender.0)
            .update(&parties.receiver.0)
            .update(&parties.exported);
        let password = Password::new(credential.secret.as_bytes());
        let bound = transcript.finalize();
        let name = |role: &[u8]| Identity::new(&[role, &bound.as_bytes()[..]].concat());
        let sender = name(b"sender");
        let receiver = name(b"receiver");
        let (state, message) = match role {
            Role::Sender => Spake2::<Ed25519Group>::start_a(&password, &sender, &receiver),
            Role::Receiver => Spake2::<Ed25519Group>::start_b(&password, &sender, &receiver),
        };
        let message = message
            .try_into()
            .expect("33 bytes: the side and a compressed point");
        (
            Self {
                role,
                state,
                transcript,
                message,
            },
            message,
        )
    }

    /// Takes the other end's message; `None` when it is none.
    pub(super) fn finish(self, theirs: &[u8; MESSAGE]) -> Option<Confirmation> {
        let Self {
            role,
            state,
            mut transcript,
            message,
        } = self;
        let key = state.finish(theirs).ok()?;
        let (first, second) = match role {
            Role::Sender => (&message, theirs),
            Role::Receiver => (theirs, &message),
        };
        let bound = transcript.update(first).update(second).finalize();
        let tag = |context| {
            let mut hasher = Hasher::new_derive_key(context);
            hasher
                .update(&(key.len() as u64).to_le_bytes())
                .update(&key)
                .update(bound.as_bytes());
            hasher.finalize()
        };
        let sender = tag(CONFIRM_SENDER);
        let receiver = tag(CONFIRM_RECEIVER);
        let (ours, theirs) = match role {
            Role::Sender => (sender, receiver),
            Role::Receiver => (receiver, sender),
        };
        Some(Confirmation {
            ours,
            theirs,
            pair: *tag(PAIR).as_bytes(),
        })
    }
}

/// What each end shows the other, to prove that it has the same key.
pub(super) struct Confirmation {
    ours: blake3::Hash,
    theirs: blake3::Hash,
    pair: [u8; 32],
}

impl Confirmation {
    /// For the other end. The receiver, which may be guessing, shows its own first.
    pub(super) fn ours(&self) -> [u8; 32] {
        *self.ours.as_bytes()
    }

    /// What only these two ends know from here on, once each has found the other right.
    pub(super) fn pair(&self) -> [u8; 32] {
        self.pair
    }

    /// Whether the other end knew the words. Takes the same time whatever it shows.
    pub(super) fn is_right(&self, theirs: [u8; 32]) -> bool {
        self.theirs == theirs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pairing::code::ShortCode;

    fn credential(code: &str) -> Credential {
        (&code.parse::<ShortCode>().unwrap()).into()
    }

    fn parties() -> Parties {
        Parties {
            sender: KeyId([1; 32]),
            receiver: KeyId([2; 32]),
            exported: [3; 32],
        }
    }

    /// Whether each end finds the other right.
    fn exchange(codes: [&str; 2], parties: [Parties; 2]) -> [bool; 2] {
        let [sent, received] = codes.map(credential);
        let (sender, first) = Exchange::begin(Role::Sender, &sent, &parties[0]);
        let (receiver, second) = Exchange::begin(Role::Receiver, &received, &parties[1]);
        let sender = sender.finish(&second).unwrap();
        let receiver = receiver.finish(&first).unwrap();
        let right = [
            sender.is_right(receiver.ours()),
            receiver.is_right(sender.ours()),
        ];
        assert_eq!(right[0], sender.pair() == receiver.pair());
        right
    }

    const CODE: &str = "417-maple-canyon-orbit";

    #[test]
    fn both_ends_of_one_connection_with_the_same_words_find_each_other_right() {
        assert_eq!(exchange([CODE, CODE], [parties(), parties()]), [true, true]);
    }

    #[test]
    fn another_word_number_key_or_connection_is_found_out_by_both() {
        for other in [
            "417-maple-canyon-orange",
            "418-maple-canyon-orbit",
            "417-canyon-maple-orbit",
        ] {
            assert_eq!(
                exchange([CODE, other], [parties(), parties()]),
                [false, false],
                "{other}"
            );
        }
        for other in [
            Parties {
                sender: KeyId([9; 32]),
                ..parties()
            },
            Parties {
                receiver: KeyId([9; 32]),
                ..parties()
            },
            Parties {
                exported: [9; 32],
                ..parties()
            },
        ] {
            assert_eq!(
                exchange([CODE, CODE], [parties(), other.clone()]),
                [false, false],
                "{other:?}"
            );
        }
    }

    /// Whoever knows all of a code but a word has the chance that the list says, with its one guess.
    #[test]
    fn of_all_words_that_a_guess_may_be_one_alone_is_right() {
        const WORDS: usize = 128;
        let words = &crate::pairing::code::list()[..WORDS];
        let code = |word: &str| format!("417-maple-canyon-{word}");
        let right = words
            .iter()
            .filter(|word| exchange([&code(words[77]), &code(word)], [parties(), parties()])[0]);
        assert_eq!(right.collect::<Vec<_>>(), [&words[77]]);
    }

    #[test]
    fn what_is_sent_back_proves_nothing() {
        let code = credential(CODE);
        let (sender, first) = Exchange::begin(Role::Sender, &code, &parties());
        // The crate tells the sides apart.
        assert!(sender.finish(&first).is_none());
        let (sender, _) = Exchange::begin(Role::Sender, &code, &parties());
        let (_, second) = Exchange::begin(Role::Receiver, &code, &parties());
        let confirmation = sender.finish(&second).unwrap();
        assert!(!confirmation.is_right(confirmation.ours()));
    }

    #[test]
    fn bytes_that_are_no_message_are_turned_away() {
        let mut message = [0; MESSAGE];
        message[0] = b'B';
        let turned_away = (0..32).filter(|&y| {
            message[1] = y;
            let (sender, _) = Exchange::begin(Role::Sender, &credential(CODE), &parties());
            sender.finish(&message).is_none()
        });
        // Half of all numbers are the height of no point on the curve.
        assert!((4..28).contains(&turned_away.count()));
    }
}
