//! The code under which something is offered now, and the receiver that has used it.

use std::time::Duration;

use tokio::time::Instant;

use super::code::{Credential, ShortCode};
use super::pair;
use super::placement::RequestedNumber;
use crate::auth::identity::{Identity, KeyId};
use crate::auth::peers::Peer;
use crate::error::Result;

/// A receiver that has shown that it knows the code.
struct Guest {
    key_id: KeyId,
    /// What it has used: with it, it may come back after it was killed or lost its connection.
    credential: Credential,
}

/// The code and its credential, until a receiver has used or burnt them or they have expired.
pub(super) struct ActiveCode {
    identity: Identity,
    /// The paired machine that the offer is for. It needs no code.
    recipient: Option<Peer>,
    lifetime: Duration,
    expires_at: Instant,
    code: Option<ShortCode>,
    credential: Option<Credential>,
    guest: Option<Guest>,
}

impl ActiveCode {
    /// No code yet; [`renew`](Self::renew) draws one.
    pub(super) fn new(identity: Identity, recipient: Option<Peer>, lifetime: Duration) -> Self {
        Self {
            identity,
            recipient,
            lifetime,
            expires_at: Instant::now(),
            code: None,
            credential: None,
            guest: None,
        }
    }

    /// This machine's key.
    pub(super) fn key_id(&self) -> KeyId {
        self.identity.key_id()
    }

    pub(super) fn code(&self) -> Option<&ShortCode> {
        self.code.as_ref()
    }

    /// The number under which the offer can be found.
    pub(super) fn number(&self) -> Option<u32> {
        self.credential.as_ref().map(Credential::number)
    }

    /// When the code expires; `None` while there is neither a code nor a guest.
    pub(super) fn expires_at(&self) -> Option<Instant> {
        let active = self.credential.is_some() || self.guest.is_some();
        active.then_some(self.expires_at)
    }

    /// The number that an offer to a paired machine always has; `None` when the offer needs a code.
    pub(super) fn fixed_number(&self) -> Option<RequestedNumber> {
        let credential = self.paired_credential()?;
        Some(pair::claimed_number(credential.number, &self.identity))
    }

    fn paired_credential(&self) -> Option<Credential> {
        let recipient = self.recipient.as_ref()?;
        Some(pair::credential(recipient, self.identity.key_id()))
    }

    /// Draws another code, at the number that a relay has given if there is one. A paired machine gets its credential again.
    ///
    /// # Errors
    /// As [`ShortCode::draw`].
    pub(super) fn renew(&mut self, relay_number: Option<u32>) -> Result<()> {
        self.expires_at = Instant::now() + self.lifetime;
        if let Some(credential) = self.paired_credential() {
            self.credential = Some(credential);
            return Ok(());
        }
        let code = match relay_number {
            Some(number) => ShortCode::draw_at(number)?,
            None => ShortCode::draw()?,
        };
        self.credential = Some((&code).into());
        self.code = Some(code);
        Ok(())
    }

    /// The credential that a receiver with this key and number must prove. Without an unused one, the guest may prove again
    /// what it has used.
    pub(super) fn credential_for(&self, key_id: KeyId, number: u32) -> Option<Credential> {
        let used = self.guest.as_ref().filter(|guest| guest.key_id == key_id);
        let credential = self
            .credential
            .as_ref()
            .or(used.map(|guest| &guest.credential))?;
        let matches = credential.number == number
            && credential.key_id.is_none_or(|expected| expected == key_id);
        matches.then(|| credential.clone())
    }

    /// Makes the code unusable, because it was guessed wrong.
    pub(super) fn burn(&mut self) {
        self.code = None;
        self.credential = None;
    }

    /// Makes the code unusable for others than this receiver.
    pub(super) fn used_by(&mut self, key_id: KeyId, credential: Credential) {
        self.burn();
        self.guest = Some(Guest { key_id, credential });
    }

    /// Makes the code unusable, also for the guest.
    pub(super) fn forget(&mut self) {
        self.burn();
        self.guest = None;
    }

    pub(super) fn is_guest(&self, key_id: KeyId) -> bool {
        self.guest
            .as_ref()
            .is_some_and(|guest| guest.key_id == key_id)
    }
}
