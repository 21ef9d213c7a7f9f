//! Trust: pins, known hosts and authorities on the client, authorized keys and authorities on the server.
//!
//! In both directions TLS verifies that the peer holds the key of its certificate. A client then decides within the
//! handshake, so that nothing is sent to the wrong server. A server accepts every key in the handshake and decides
//! afterwards, with [`Admission::rights_of`](super::Admission::rights_of), so that it can tell a refused client the
//! reason.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::verify_tls13_signature;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, PeerIncompatible, RootCertStore,
    SignatureScheme,
};

use super::home::Home;
use super::identity::{KeyId, provider};
use super::known_hosts;
use crate::error::{Error, Result};

/// How a client recognizes the right server. The first of these that applies decides:
///
/// 1. the pin: the server must have this key;
/// 2. the lines for this host in known_hosts: one of them must name the key;
/// 3. a certificate, valid now and for this host name, that leads to one of the authorities.
///
/// Otherwise the server is unknown ([`Error::UnknownHost`]).
#[derive(Debug, Clone, Default)]
pub struct ServerTrust {
    /// The key that the server must have.
    pub pin: Option<KeyId>,
    /// The file of known hosts; see [`known_hosts`].
    pub known_hosts: Option<PathBuf>,
    /// Certificates of authorities.
    pub authorities: Vec<CertificateDer<'static>>,
    #[doc(hidden)]
    pub unchecked_key: UncheckedKey,
}

/// Whether a connection starts with any key. Only this crate can enable it: see [`trust_any_key`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UncheckedKey(bool);

impl UncheckedKey {
    pub(crate) fn is_allowed(self) -> bool {
        self.0
    }
}

/// Accepts any key unless `pin` is set. The caller must authenticate the peer by a code before it sends anything else;
/// a relay needs no authentication. Not part of the public API, since it disables the check of the server.
pub fn trust_any_key(pin: Option<KeyId>) -> ServerTrust {
    ServerTrust {
        pin,
        unchecked_key: UncheckedKey(true),
        ..ServerTrust::default()
    }
}

impl ServerTrust {
    /// Reads the settings in HAUL_HOME. The pin, if given, takes precedence.
    ///
    /// # Errors
    /// [`Error::Home`] when the authorities cannot be read.
    pub fn of_home(home: &Home, pin: Option<KeyId>) -> Result<Self> {
        let authorities = read_authorities(&home.authorities())?;
        Ok(Self {
            pin,
            known_hosts: Some(home.known_hosts()),
            authorities,
            unchecked_key: UncheckedKey::default(),
        })
    }

    /// Returns the verifier for connections to one host, with the current known_hosts. Reads a small file.
    ///
    /// # Errors
    /// [`Error::Home`] when known_hosts cannot be read, [`Error::Usage`] when an authority's certificate is invalid.
    pub fn verifier(&self, host: &str, port: u16) -> Result<Arc<ServerVerifier>> {
        let host = known_hosts::host_and_port(host, port);
        let rule = match (self.pin, &self.known_hosts) {
            (None, _) if self.unchecked_key.is_allowed() => Rule::AnyKey,
            (Some(pin), _) => Rule::Pin(pin),
            (None, Some(file)) => match known_hosts::find(file, &host)? {
                known if known.is_empty() => Rule::Authorities,
                known => Rule::Known {
                    known,
                    file: file.clone(),
                },
            },
            (None, None) => Rule::Authorities,
        };
        let authorities = match roots(&self.authorities)? {
            roots if roots.is_empty() => None,
            roots => Some(
                WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider().clone())
                    .build()
                    .map_err(|e| Error::Usage(format!("cannot use the authorities: {e}")))?,
            ),
        };
        Ok(Arc::new(ServerVerifier {
            host,
            rule,
            authorities,
            failure: Mutex::new(None),
        }))
    }
}

/// The rule that decides on a server's certificate.
#[derive(Debug)]
enum Rule {
    AnyKey,
    Pin(KeyId),
    Known { known: Vec<KeyId>, file: PathBuf },
    Authorities,
}

/// Checks a server's certificate within the handshake.
///
/// TLS carries only an alert; [`take_failure`](Self::take_failure) returns the precise [`Error`].
#[derive(Debug)]
pub struct ServerVerifier {
    /// Host and port as in known_hosts.
    host: String,
    rule: Rule,
    authorities: Option<Arc<WebPkiServerVerifier>>,
    failure: Mutex<Option<Error>>,
}

impl ServerVerifier {
    /// Returns the error if this verifier ended the last handshake.
    pub fn take_failure(&self) -> Option<Error> {
        self.failure
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .take()
    }

    /// Returns host and port, as in known_hosts.
    pub fn host(&self) -> &str {
        &self.host
    }

    fn fail(&self, error: Error, alert: CertificateError) -> rustls::Error {
        *self.failure.lock().unwrap_or_else(|e| e.into_inner()) = Some(error);
        alert.into()
    }

    fn check(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<()> {
        let key_id = KeyId::of_certificate(certificate)?;
        let host = self.host.clone();
        let presented = key_id.to_string();
        match &self.rule {
            Rule::AnyKey => Ok(()),
            Rule::Pin(pin) if *pin == key_id => Ok(()),
            Rule::Pin(pin) => Err(Error::WrongPin {
                host,
                pinned: pin.to_string(),
                presented,
            }),
            Rule::Known { known, .. } if known.contains(&key_id) => Ok(()),
            Rule::Known { known, file } => {
                let known: Vec<_> = known.iter().map(KeyId::to_string).collect();
                Err(Error::ChangedHost {
                    host,
                    known: known.join(" or "),
                    presented,
                    file: file.clone(),
                })
            }
            Rule::Authorities => {
                let Some(authorities) = &self.authorities else {
                    return Err(Error::UnknownHost {
                        host,
                        key_id: presented,
                    });
                };
                match authorities.verify_server_cert(certificate, others, name, &[], now) {
                    Ok(_) => Ok(()),
                    // A separate error: users of an authority should not learn to accept such servers by hand.
                    Err(rustls::Error::InvalidCertificate(why)) if is_about_time_or_name(&why) => {
                        Err(Error::NotTrusted {
                            host: host.into(),
                            why: format!("{why} (its key is {presented})").into(),
                        })
                    }
                    Err(_) => Err(Error::UnknownHost {
                        host,
                        key_id: presented,
                    }),
                }
            }
        }
    }
}

fn is_about_time_or_name(why: &CertificateError) -> bool {
    use CertificateError::*;
    matches!(
        why,
        Expired
            | ExpiredContext { .. }
            | NotValidYet
            | NotValidYetContext { .. }
            | NotValidForName
            | NotValidForNameContext { .. }
    )
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.check(end_entity, intermediates, server_name, now) {
            Ok(()) => Ok(ServerCertVerified::assertion()),
            Err(error) => Err(self.fail(error, CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &provider().signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms).map_err(|_| {
            let why = "it does not hold the key of its certificate; nothing was sent";
            self.fail(
                Error::NotTrusted {
                    host: self.host.as_str().into(),
                    why: why.into(),
                },
                CertificateError::BadSignature,
            )
        })
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Accepts every client that presents a certificate and holds its key.
/// [`Admission::rights_of`](super::Admission::rights_of) decides on its rights after the handshake.
#[derive(Debug)]
pub struct ClientVerifier;

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        match KeyId::of_certificate(end_entity) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(_) => Err(CertificateError::BadEncoding.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// Reads certificates of authorities from a PEM file; none when the file is missing.
///
/// # Errors
/// [`Error::Home`] when the file cannot be read or has other content.
pub fn read_authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bad = |why: String| Error::Home {
        path: path.to_owned(),
        why,
    };
    let pem = match std::fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        pem => pem.map_err(|e| bad(format!("cannot read the file: {e}")))?,
    };
    let authorities = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| bad(format!("cannot parse certificates in PEM: {e}")))?;
    if authorities.is_empty() {
        return Err(bad(
            "the file has no certificate; add the authority's as PEM, or remove the file".into(),
        ));
    }
    roots(&authorities).map_err(|e| bad(e.to_string()))?;
    Ok(authorities)
}

pub(super) fn roots(authorities: &[CertificateDer<'static>]) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority.clone()).map_err(|e| {
            Error::Usage(format!("cannot use the certificate of an authority: {e}"))
        })?;
    }
    Ok(roots)
}
