//! Datagrams of the sync channel, prompts and answers included: any, and any content that a holder of the key might have
//! signed; and snapshots, which they carry.

#![no_main]

use std::net::Ipv4Addr;

use libfuzzer_sys::fuzz_target;
use rfsis_agent::sync::{Channel, Confirm, Prompts, Record, Records, Sack, Snapshot, Term};
use rfsis_common::maps::FlowKey;
use rfsis_common::prompt::PromptSeen;

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
    prompts(bytes);
    if let Ok(snapshot) = Snapshot::parse(bytes) {
        let written = Snapshot::parse(&snapshot.to_bytes());
        assert_eq!(written.as_ref(), Ok(&snapshot));
    }
});

fn prompts(bytes: &[u8]) {
    let end = |node, peer, own_session, peer_session| {
        let mut end = Prompts::new(KEY, "fuzz", node, peer, 9501);
        end.set_term(Some(Term {
            own_session,
            peer_session,
            epoch: 7,
        }));
        end
    };
    let (mut sender, receiver) = (end(A, B, 1, 2), end(B, A, 2, 1));
    let mut seen = PromptSeen::default();
    assert!(receiver.open(bytes, A, seen).is_err(), "a forged prompt");
    assert!(receiver.open_answer(bytes, A).is_err(), "a forged answer");
    let words = bytes
        .as_chunks()
        .0
        .iter()
        .map(|word| u32::from_le_bytes(*word));
    let words: Vec<u32> = words.collect();
    let confirms = words
        .as_chunks()
        .0
        .iter()
        .map(|&[client, ports, isn, ack, edge]| Confirm {
            flow: FlowKey {
                client_addr: client,
                client_port: ports as u16,
                service_port: (ports >> 16) as u16,
            },
            client_isn: isn,
            ack,
            edge,
            sack: Sack::default(),
        });
    let confirms: Vec<Confirm> = confirms.collect();
    let mut arrived = Vec::new();
    sender.seal(&confirms, |datagram| {
        let (opened, now) = receiver.open(datagram, A, seen).expect("what was sealed");
        arrived.extend(opened);
        seen = now;
        let again = receiver.open(datagram, A, seen);
        assert!(again.is_err(), "a replayed prompt");
    });
    assert_eq!(arrived, confirms);
}
