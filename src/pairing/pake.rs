//! Password-authenticated key exchange: two ends find out whether they know the same words, and reveal nothing about them.
//!
//! It is SPAKE2 (RFC 9382, in the form of the crate spake2) within an established TLS connection. An attacker in the middle
//! has two connections with different exporters (RFC 8446, section 7.5), so the exchange fails on both. An attacker that
//! guesses has one guess, which says nothing about the other words. Only this file knows which exchange is used.

use blake3::Hasher;
use quinn::Connection;
use spake2::{Ed25519Group, Identity, Password, Spake2};

use super::code::Credential;
use crate::auth::identity::KeyId;

/// Bytes in each side's message.
pub(super) const MESSAGE_SIZE: usize = 33;
const EXPORTER_LABEL: &[u8] = b"EXPORTER-haul-code";
// Contexts of BLAKE3's key derivation.
const TRANSCRIPT_CONTEXT: &str = "haul/1 code: transcript";
const CONFIRM_SENDER_CONTEXT: &str = "haul/1 code: the sender confirms";
const CONFIRM_RECEIVER_CONTEXT: &str = "haul/1 code: the receiver confirms";
const PAIR_CONTEXT: &str = "haul/1 code: a pair";

/// The two ends of an exchange, and their connection.
#[derive(Debug, Clone)]
pub(super) struct Parties {
    pub(super) sender: KeyId,
    pub(super) receiver: KeyId,
    /// Keying material that only the two ends of the connection have.
    pub(super) exported: [u8; 32],
}

impl Parties {
    /// The parties of a connection; `None` before its handshake is complete.
    pub(super) fn of(connection: &Connection, sender: KeyId, receiver: KeyId) -> Option<Self> {
        let mut exported = [0; 32];
        connection
            .export_keying_material(&mut exported, EXPORTER_LABEL, b"")
            .ok()?;
        Some(Self {
            sender,
            receiver,
            exported,
        })
    }
}

/// This end's role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Sender,
    Receiver,
}

/// An exchange that waits for the other end's message.
pub(super) struct Exchange {
    role: Role,
    state: Spake2<Ed25519Group>,
    transcript: Hasher,
    message: [u8; MESSAGE_SIZE],
}

impl Exchange {
    /// Begins an exchange. The message is for the other end.
    pub(super) fn begin(
        role: Role,
        credential: &Credential,
        parties: &Parties,
    ) -> (Self, [u8; MESSAGE_SIZE]) {
        let mut transcript = Hasher::new_derive_key(TRANSCRIPT_CONTEXT);
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

    /// Finishes the exchange with the other end's message; `None` when the message is invalid.
    pub(super) fn finish(self, theirs: &[u8; MESSAGE_SIZE]) -> Option<Confirmation> {
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
        let sender = tag(CONFIRM_SENDER_CONTEXT);
        let receiver = tag(CONFIRM_RECEIVER_CONTEXT);
        let (ours, theirs) = match role {
            Role::Sender => (sender, receiver),
            Role::Receiver => (receiver, sender),
        };
        Some(Confirmation {
            ours,
            theirs,
            shared_secret: *tag(PAIR_CONTEXT).as_bytes(),
        })
    }
}

/// The tags by which each end proves to the other that it has the same key.
pub(super) struct Confirmation {
    ours: blake3::Hash,
    theirs: blake3::Hash,
    shared_secret: [u8; 32],
}

impl Confirmation {
    /// This end's tag. The receiver, which may be guessing, sends its own first.
    pub(super) fn ours(&self) -> [u8; 32] {
        *self.ours.as_bytes()
    }

    /// A secret that only these two ends know, once each has confirmed the other.
    pub(super) fn shared_secret(&self) -> [u8; 32] {
        self.shared_secret
    }

    /// Whether the other end knew the words. Takes constant time.
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

    /// Runs an exchange. Returns for each end whether it confirms the other.
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
        assert_eq!(right[0], sender.shared_secret() == receiver.shared_secret());
        right
    }

    const CODE: &str = "417-maple-canyon-orbit";

    #[test]
    fn ends_with_the_same_words_confirm_each_other() {
        assert_eq!(exchange([CODE, CODE], [parties(), parties()]), [true, true]);
    }

    #[test]
    fn both_ends_detect_any_other_word_number_key_or_connection() {
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

    /// An attacker that lacks one word of a code has one guess among all words.
    #[test]
    fn only_one_word_is_a_right_guess() {
        const WORDS: usize = 128;
        let words = &crate::pairing::code::list()[..WORDS];
        let code = |word: &str| format!("417-maple-canyon-{word}");
        let right = words
            .iter()
            .filter(|word| exchange([&code(words[77]), &code(word)], [parties(), parties()])[0]);
        assert_eq!(right.collect::<Vec<_>>(), [&words[77]]);
    }

    #[test]
    fn reflected_messages_prove_nothing() {
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
    fn invalid_messages_are_refused() {
        let mut message = [0; MESSAGE_SIZE];
        message[0] = b'B';
        let refused = (0..32).filter(|&y| {
            message[1] = y;
            let (sender, _) = Exchange::begin(Role::Sender, &credential(CODE), &parties());
            sender.finish(&message).is_none()
        });
        // About half of all y coordinates belong to no point on the curve.
        assert!((4..28).contains(&refused.count()));
    }
}
