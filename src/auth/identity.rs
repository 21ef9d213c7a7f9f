//! Identities: a key pair with its certificate, and the key id that peers know it by.
//!
//! A peer is identified by its key, not by its certificate: a [`KeyId`] stays the same when an authority signs a new
//! certificate for the key.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use data_encoding::BASE64_NOPAD;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;

use crate::error::{Error, Result};

/// Prefix of a key id: the digest's name, as ssh writes it.
const PREFIX: &str = "SHA256:";

/// Name in generated certificates. It is not checked: such a certificate is identified by its key.
const CERTIFICATE_NAME: &str = "haul";

/// Returns the cryptography of all handshakes, with its order of preference (X25519MLKEM768 first).
pub(crate) fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    &PROVIDER
}

/// Identifies a key: SHA-256 of the certificate's SubjectPublicKeyInfo (RFC 5280, section 4.1) in DER.
///
/// Written and parsed as `SHA256:` and 43 characters of base64, like ssh fingerprints.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 32]);

impl KeyId {
    /// Returns the key id of a certificate. Only TLS shows whether the peer holds the key.
    ///
    /// # Errors
    /// [`Error::Protocol`] when this is not an X.509 certificate.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self> {
        let parsed = ParsedCertificate::try_from(certificate)
            .map_err(|e| Error::Protocol(format!("cannot read the certificate: {e}").into()))?;
        let hash = digest(&SHA256, &parsed.subject_public_key_info());
        let mut id = [0; 32];
        id.copy_from_slice(hash.as_ref());
        Ok(Self(id))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", BASE64_NOPAD.encode(&self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a key id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a key id: it should be SHA256: and 43 letters, digits, + and /, as `haul id` prints it"
)]
pub struct BadKeyId;

impl FromStr for KeyId {
    type Err = BadKeyId;

    fn from_str(text: &str) -> Result<Self, BadKeyId> {
        let encoded = text.strip_prefix(PREFIX).ok_or(BadKeyId)?;
        // 32 bytes have one character of padding, which ssh omits.
        let encoded = encoded.strip_suffix('=').unwrap_or(encoded);
        let decoded = BASE64_NOPAD
            .decode(encoded.as_bytes())
            .map_err(|_| BadKeyId)?;
        decoded.try_into().map(Self).map_err(|_| BadKeyId)
    }
}

/// A private key and its certificate chain.
#[derive(Clone)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
    key_id: KeyId,
}

impl Identity {
    /// Generates a new key with a self-signed certificate.
    ///
    /// It uses ECDSA on P-256, which every implementation of TLS 1.3 supports (RFC 8446, section 9.1). The
    /// certificate never expires, since peers trust the key.
    ///
    /// # Errors
    /// [`Error::Io`] when the system gives no randomness.
    pub fn generate() -> Result<Self> {
        let (chain, key) = self_signed()?;
        Self::from_pem(chain.as_bytes(), key.as_bytes())
    }

    /// Reads a key and its chain, own certificate first, from PEM.
    ///
    /// # Errors
    /// [`Error::Usage`] when the PEM has no certificate or no key, or they do not belong together.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self> {
        Self::parse(chain, key).map_err(Error::Usage)
    }

    pub(super) fn parse(chain: &[u8], key: &[u8]) -> Result<Self, String> {
        let chain = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| format!("cannot read the certificate: {e}"))?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|e| format!("cannot read the private key: {e}"))?;
        let first = chain.first().ok_or("there is no certificate")?;
        let key_id = KeyId::of_certificate(first).map_err(|e| e.to_string())?;
        let signing = provider()
            .key_provider
            .load_private_key(key.clone_key())
            .map_err(|e| format!("cannot use the private key: {e}"))?;
        CertifiedKey::new(chain.clone(), signing)
            .keys_match()
            .map_err(|_| "the private key does not belong to the certificate")?;
        Ok(Self {
            chain,
            key: Arc::new(key),
            key_id,
        })
    }

    /// Returns the key id by which peers identify this machine.
    pub fn key_id(&self) -> KeyId {
        self.key_id
    }

    /// Returns the certificates presented to peers, own one first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// Returns a copy of the private key.
    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

/// Generates a key and a self-signed certificate, as PEM.
pub(super) fn self_signed() -> Result<(String, String)> {
    use rcgen::{
        CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
        date_time_ymd,
    };
    let make = || -> Result<_, rcgen::Error> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::new([CERTIFICATE_NAME.to_owned()])?;
        params
            .distinguished_name
            .push(DnType::CommonName, CERTIFICATE_NAME);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        // 99991231235959Z marks a certificate without an end (RFC 5280, section 4.1.2.5). The early start helps
        // machines whose clock lags.
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(9999, 12, 31) + Duration::from_secs(24 * 60 * 60 - 1);
        Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
    };
    make().map_err(|e| Error::io("cannot generate a key pair")(io::Error::other(e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_ids_are_parsed_as_haul_ssh_and_openssl_write_them() {
        let id = Identity::generate().unwrap().key_id();
        let text = id.to_string();
        assert_eq!(text.len(), PREFIX.len() + 43);
        assert_eq!(text.parse(), Ok(id));
        assert_eq!(format!("{text}=").parse(), Ok(id));
        for bad in [
            "",
            "SHA256:",
            "sha256:",
            &text[PREFIX.len()..],
            &text[..40],
            &format!("{text}AAAA"),
            "SHA256:!!!!",
        ] {
            assert_eq!(bad.parse::<KeyId>(), Err(BadKeyId), "{bad}");
        }
    }

    #[test]
    fn a_key_id_is_the_digest_of_the_whole_public_key_info() {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new([])
            .unwrap()
            .self_signed(&key)
            .unwrap();
        let info = rcgen::PublicKeyData::subject_public_key_info(&key);
        assert_eq!(
            KeyId::of_certificate(certificate.der()).unwrap().0,
            digest(&SHA256, &info).as_ref()
        );
        assert!(KeyId::of_certificate(&CertificateDer::from(vec![0x30, 0])).is_err());
    }

    #[test]
    fn debug_output_does_not_show_the_key() {
        let identity = Identity::generate().unwrap();
        assert_eq!(
            format!("{identity:?}"),
            format!("Identity {{ key_id: {}, .. }}", identity.key_id())
        );
    }

    #[test]
    fn a_key_without_its_certificate_is_no_identity() {
        let (chain, _) = self_signed().unwrap();
        let (_, other) = self_signed().unwrap();
        let error = Identity::from_pem(chain.as_bytes(), other.as_bytes()).unwrap_err();
        assert!(error.to_string().contains("does not belong"), "{error}");
        assert!(Identity::from_pem(b"", other.as_bytes()).is_err());
        assert!(Identity::from_pem(chain.as_bytes(), b"").is_err());
    }
}
