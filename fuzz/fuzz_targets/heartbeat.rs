//! Heartbeats: any frame, and any trailer that a holder of the key might have signed.

#![no_main]

use std::net::Ipv4Addr;

use libfuzzer_sys::fuzz_target;
use rfsis_agent::auth::ClusterKey;
use rfsis_agent::heartbeat::Codec;
use rfsis_common::heartbeat::{ARP_LEN, ETHERNET_LEN, FRAME_LEN, MAC_LEN};

/// The last byte of an ARP packet's operation (RFC 826).
const OPERATION: usize = ETHERNET_LEN + 7;

const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";

fuzz_target!(|frame: &[u8]| {
    let codec = Codec::new(KEY, "fuzz");
    assert!(codec.parse(frame).is_err(), "a forged heartbeat");

    // The same, signed: what the checks behind the MAC let pass is what the codec itself would write.
    let Some(mut frame) = frame.first_chunk::<FRAME_LEN>().copied() else {
        return;
    };
    sign(&mut frame);
    let Ok(heartbeat) = codec.parse(&frame) else {
        return;
    };
    // The targets are the last fields of an ARP packet (RFC 826); zeros mean everybody.
    let end = ETHERNET_LEN + ARP_LEN;
    let target: [u8; 6] = frame[end - 10..end - 4].try_into().unwrap();
    let to = (target != [0; 6]).then_some(target);
    let peer: [u8; 4] = frame[end - 4..end].try_into().unwrap();
    let mut written = codec.emit(&heartbeat, to, Ipv4Addr::from(peer));
    if to.is_none() {
        // Older agents send requests to all.
        written[OPERATION] = frame[OPERATION];
        sign(&mut written);
    }
    assert_eq!(written, frame);
});

fn sign(frame: &mut [u8; FRAME_LEN]) {
    let tag = ClusterKey::new(KEY).tag(&frame[ETHERNET_LEN..FRAME_LEN - MAC_LEN]);
    frame[FRAME_LEN - MAC_LEN..].copy_from_slice(&tag);
}
