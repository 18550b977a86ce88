//! Datagrams of the sync channel: any, and any content that a holder of the key might have signed; and
//! snapshots, which they carry.

#![no_main]

use std::net::Ipv4Addr;

use libfuzzer_sys::fuzz_target;
use rfsis_agent::sync::{Channel, Record, Records, Snapshot};

const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";
const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

fuzz_target!(|bytes: &[u8]| {
    let mut receiver = Channel::new(KEY, "fuzz", B, A, 2);
    receiver.set_peer(Some(1));
    assert!(receiver.open(bytes, A, 7).is_err(), "a forged datagram");

    if let Ok(records) = Records::parse(bytes) {
        let records: Vec<Record> = records.collect();
        let mut sender = Channel::new(KEY, "fuzz", A, B, 1);
        sender.set_peer(Some(2));
        let mut arrived = Vec::new();
        sender.seal(7, false, records.clone(), |datagram| {
            let opened = receiver.open(datagram, A, 7).expect("what was sealed");
            arrived.extend(opened.records);
            let again = receiver.open(datagram, A, 7);
            assert!(again.is_err(), "a replayed datagram");
        });
        assert_eq!(arrived, records);
    }
    if let Ok(snapshot) = Snapshot::parse(bytes) {
        let written = Snapshot::parse(&snapshot.to_bytes());
        assert_eq!(written.as_ref(), Ok(&snapshot));
    }
});
