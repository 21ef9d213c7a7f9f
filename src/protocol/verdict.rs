//! The receiver's answers to entries.

use super::{Done, Frame, Held, Malformed, Message, Refuse, Skip, Want};
use crate::error::Reason;

/// The receiver's answer to an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The entry exists already.
    Skip(u64),
    /// The entry is committed without a transfer.
    Done(u64),
    /// The sender is to send the content. The receiver holds these ranges.
    Want(u64, Vec<Held>),
    /// The receiver refuses the entry.
    Refuse(u64, Reason),
}

impl Verdict {
    /// Decodes a verdict.
    ///
    /// # Errors
    /// [`Malformed`] when the frame is another message, or not well-formed.
    pub fn decode(frame: &Frame) -> Result<Self, Malformed> {
        Ok(match frame.kind {
            Skip::TYPE => Self::Skip(frame.decode::<Skip>()?.id),
            Done::TYPE => Self::Done(frame.decode::<Done>()?.id),
            Refuse::TYPE => {
                let refuse = frame.decode::<Refuse>()?;
                Self::Refuse(refuse.id, refuse.why.into())
            }
            _ => {
                let want = frame.decode::<Want>()?;
                Self::Want(want.id, want.held.unwrap_or_default())
            }
        })
    }

    /// Appends the verdict as a message.
    pub fn put(self, out: &mut bytes::BytesMut) {
        match self {
            Self::Skip(id) => Skip { id }.put(out),
            Self::Done(id) => Done { id }.put(out),
            Self::Want(id, held) => Want {
                id,
                held: (!held.is_empty()).then_some(held),
            }
            .put(out),
            Self::Refuse(id, reason) => Refuse {
                id,
                why: reason.into(),
            }
            .put(out),
        }
    }

    /// The number of the entry.
    pub fn id(&self) -> u64 {
        match *self {
            Self::Skip(id) | Self::Done(id) | Self::Want(id, _) | Self::Refuse(id, _) => id,
        }
    }
}
