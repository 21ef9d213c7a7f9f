//! Peers whose acknowledgements lie. Anyone on the path can read and write Initial packets (RFC 9001, section 5.2), so
//! one test with these suffices; quinn checks those of every packet number space in the same way.

use std::net::Ipv4Addr;

use haul::{Client, Config, Error, Identity, ServerTrust};
use rustls::Side;
use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::quic::{Keys, Version};
use tokio::net::UdpSocket;

use crate::hostile::peer::*;

/// An Initial packet without a token (RFC 9000, section 17.2.2), number 0 in two bytes, that holds these frames, as a
/// server's answer to a client's first.
fn answer(client: &[u8], frames: &[u8]) -> Vec<u8> {
    let id_at = |at: usize| &client[at + 1..at + 1 + usize::from(client[at])];
    let destination = id_at(5);
    let source = id_at(6 + destination.len());
    let suite = TLS13_AES_128_GCM_SHA256.tls13().unwrap();
    let keys = Keys::initial(
        Version::V1,
        suite,
        suite.quic.unwrap(),
        destination,
        Side::Server,
    );
    let own = &[7; 8];
    let length = u16::try_from(2 + frames.len() + keys.local.packet.tag_len()).unwrap() | 0x4000;
    let ids = [&[source.len() as u8], source, &[own.len() as u8], own].concat();
    let mut header = [
        &[0xc1, 0, 0, 0, 1],
        &ids[..],
        &[0],
        &length.to_be_bytes(),
        &[0, 0],
    ]
    .concat();
    let mut payload = frames.to_vec();
    let tag = keys
        .local
        .packet
        .encrypt_in_place(0, &header, &mut payload)
        .unwrap();
    payload.extend_from_slice(tag.as_ref());
    // The sample begins where a packet number of four bytes would end (RFC 9001, section 5.4.2).
    let sample = &payload[2..2 + keys.local.header.sample_len()];
    let (first, rest) = header.split_first_mut().unwrap();
    let number = rest.len() - 2;
    keys.local
        .header
        .encrypt_in_place(sample, first, &mut rest[number..])
        .unwrap();
    [header, payload].concat()
}

/// Returns the client's error for a server that answers its first packet with these frames.
async fn outcome(frames: &[u8]) -> Error {
    watch_panics();
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = server.local_addr().unwrap().port();
    let identity = Identity::generate().unwrap();
    let trust = ServerTrust {
        pin: Some(identity.key_id()),
        ..ServerTrust::default()
    };
    let config = Config {
        handshake: std::time::Duration::from_secs(2),
        ..impatient()
    };
    let connecting = Client::connect(&identity, &trust, "127.0.0.1", port, &config);
    let answering = async {
        let mut packet = [0; 2048];
        loop {
            let (length, client) = server.recv_from(&mut packet).await.unwrap();
            // The probe is a single byte.
            if length > 1 {
                server
                    .send_to(&answer(&packet[..length], frames), client)
                    .await
                    .unwrap();
            }
        }
    };
    let error = tokio::select! {
        connected = within(connecting) => connected.err().expect("no connection"),
        () = answering => unreachable!(),
    };
    assert!(
        matches!(&error, Error::Unreachable { host, .. } if host == "127.0.0.1"),
        "{error:?}"
    );
    no_panics();
    error
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledging_unsent_packets_breaks_the_protocol() {
    let padding = [0; 20];
    // ACK: largest acknowledged 1,000, delay 0, no more ranges, and nothing below the largest.
    let error = outcome(&[&[0x02, 0x43, 0xe8, 0, 0, 0], &padding[..]].concat())
        .await
        .to_string();
    assert!(error.contains("unsent packet acked"), "{error}");
    // An acknowledgement of sent packets causes no such error: only the rest of the handshake is missing.
    let error = outcome(&[&[0x02, 0, 0, 0, 0], &padding[..]].concat())
        .await
        .to_string();
    assert!(
        error.contains("the handshake did not end in time"),
        "{error}"
    );
}
