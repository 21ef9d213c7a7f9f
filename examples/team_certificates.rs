//! Makes an authority for a team, once, and a certificate with its key for each name:
//! `cargo run --example team_certificates -- certs alice bob server.example.org`
//!
//! Nothing that exists is overwritten. See certs/README.md for what to do with the files.
#![allow(
    clippy::print_stdout,
    reason = "this is a program of its own, and says what it made"
)]

use std::error::Error;
use std::fs::{DirBuilder, OpenOptions, read_to_string};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use haul::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// An authority outlives the people who remember how it was made.
const AUTHORITY_DAYS: u32 = 3_650;
const CERTIFICATE_DAYS: u32 = 730;
/// Part of what links a certificate to its authority: both must spell it the same.
const AUTHORITY_NAME: &str = "haul team authority";

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments
        .next()
        .ok_or("usage: team_certificates DIRECTORY NAME...")?;
    let names: Vec<_> = arguments.collect();
    make(Path::new(&directory), &names)
}

/// Makes what is missing of an authority and of a directory for each name.
pub(crate) fn make(directory: &Path, names: &[String]) -> Result<(), Box<dyn Error>> {
    let authority = authority(directory)?;
    for name in names {
        let home = directory.join(name);
        if home.parent() != Some(directory) || name == ".." {
            return Err(format!("{name} cannot be the name of a directory").into());
        }
        if home.exists() {
            println!("{}: there already, left as it is", home.display());
            continue;
        }
        let (key, certificate) = leaf(name, &authority)?;
        DirBuilder::new().mode(0o700).create(&home)?;
        put(
            &home.join("authorities.pem"),
            &read_to_string(directory.join("authority.pem"))?,
            0o644,
        )?;
        put(&home.join("cert.pem"), &certificate, 0o644)?;
        put(&home.join("key.pem"), &key, 0o600)?;
        println!(
            "{}: {}",
            home.display(),
            Identity::from_pem(certificate.as_bytes(), key.as_bytes())?.key_id()
        );
    }
    Ok(())
}

/// The authority in a directory, made if there is none.
fn authority(directory: &Path) -> Result<Issuer<'static, KeyPair>, Box<dyn Error>> {
    let (key_file, certificate_file) = (
        directory.join("authority.key"),
        directory.join("authority.pem"),
    );
    let mut params = valid_for(CertificateParams::default(), AUTHORITY_DAYS);
    params
        .distinguished_name
        .push(DnType::CommonName, AUTHORITY_NAME);
    // It signs certificates of machines and people, and no further authorities.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    if key_file.exists() || certificate_file.exists() {
        let (key, certificate) = (
            read_to_string(&key_file)?,
            read_to_string(&certificate_file)?,
        );
        Identity::from_pem(certificate.as_bytes(), key.as_bytes())?;
        return Ok(Issuer::new(params, KeyPair::from_pem(&key)?));
    }
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let certificate = params.self_signed(&key)?.pem();
    DirBuilder::new().recursive(true).create(directory)?;
    put(&key_file, &key.serialize_pem(), 0o600)?;
    put(&certificate_file, &certificate, 0o644)?;
    println!(
        "{}: a new authority; keep its key to yourself",
        certificate_file.display()
    );
    Ok(Issuer::new(params, key))
}

/// A key and its certificate, as PEM, for a machine that is server or client or both.
fn leaf(name: &str, authority: &Issuer<'_, KeyPair>) -> Result<(String, String), Box<dyn Error>> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = valid_for(CertificateParams::new([name.to_owned()])?, CERTIFICATE_DAYS);
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, authority)?.pem();
    Ok((key.serialize_pem(), certificate))
}

fn valid_for(mut params: CertificateParams, days: u32) -> CertificateParams {
    params.distinguished_name = rcgen::DistinguishedName::new();
    // A day back, for machines whose clock lags.
    params.not_before = (SystemTime::now() - DAY).into();
    params.not_after = (SystemTime::now() + DAY * days).into();
    params
}

fn put(path: &Path, content: &str, mode: u32) -> Result<(), Box<dyn Error>> {
    let mut file = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(mode)
        .open(path)
        .map_err(|e| format!("{}: {e}", path.display()))?;
    file.write_all(content.as_bytes())?;
    Ok(file.sync_all()?)
}
