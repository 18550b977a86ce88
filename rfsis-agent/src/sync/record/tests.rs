use proptest::option;
use proptest::prelude::*;

use super::*;

fn flows() -> impl Strategy<Value = FlowKey> {
    any::<(u32, u16, u16)>().prop_map(|(client_addr, client_port, service_port)| FlowKey {
        client_addr,
        client_port,
        service_port,
    })
}

fn options() -> impl Strategy<Value = Options> {
    (
        option::of(any::<u16>()),
        option::of(0u8..=14),
        any::<bool>(),
        option::of(any::<(u32, u32)>()),
    )
        .prop_map(|(mss, window_scale, sack_permitted, timestamp)| Options {
            mss,
            window_scale,
            sack_permitted,
            timestamp,
        })
}

fn sacks() -> impl Strategy<Value = Sack> {
    proptest::collection::vec(any::<(u32, u32)>(), 0..=Sack::MAX)
        .prop_map(|blocks| blocks.into_iter().collect())
}

/// Any record that an agent may write.
pub(in crate::sync) fn records() -> impl Strategy<Value = Record> {
    let opens = (flows(), any::<(u32, u32, u16)>(), options(), options()).prop_map(
        |(flow, (client_isn, active_isn, client_window), client, active)| Open {
            flow,
            client_isn,
            active_isn,
            client_window,
            client,
            active,
        },
    );
    let opens = (opens, any::<bool>()).prop_map(|(open, known)| match known {
        false => Record::Open(open),
        true => Record::Known(open),
    });
    let confirms = (flows(), any::<(u32, u32, u32)>(), sacks()).prop_map(
        |(flow, (client_isn, ack, edge), sack)| {
            Record::Confirm(Confirm {
                flow,
                client_isn,
                ack,
                edge,
                sack,
            })
        },
    );
    let one = || (flows(), any::<u32>());
    let parts = (
        one(),
        1..=MAX_PART_LEN,
        any::<(prop::sample::Index, u32, u8)>(),
    )
        .prop_map(|((flow, join), len, (offset, rest, byte))| {
            let offset = offset.index(MAX_SNAPSHOT - len) as u32;
            let end = offset + len as u32;
            Record::Part(Part {
                flow,
                join,
                total: end + rest % (MAX_SNAPSHOT as u32 - end + 1),
                offset,
                bytes: vec![byte; len].into(),
            })
        });
    prop_oneof![
        parts,
        (one(), any::<(u32, u32)>()).prop_map(|((flow, join), (client_isn, next))| {
            Record::Offer(Offer {
                flow,
                join,
                client_isn,
                next,
            })
        }),
        (one(), any::<u32>()).prop_map(|((flow, join), next)| Record::Got { flow, join, next }),
        one().prop_map(|(flow, join)| Record::Decline { flow, join }),
        one().prop_map(|(flow, join)| Record::Lost { flow, join }),
        opens,
        confirms,
        one().prop_map(|(flow, client_isn)| Record::Refuse { flow, client_isn }),
        one().prop_map(|(flow, client_isn)| Record::Close { flow, client_isn }),
        (one(), any::<u32>()).prop_map(|((flow, client_isn), ack)| Record::Told {
            flow,
            client_isn,
            ack
        }),
    ]
}

fn emit(records: &[Record]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records {
        record.emit(&mut bytes);
    }
    bytes
}

fn parse(bytes: &[u8]) -> Result<Vec<Record>, RecordError> {
    Records::parse(bytes).map(Iterator::collect)
}

proptest! {
    #[test]
    fn what_is_emitted_is_parsed(records in proptest::collection::vec(records(), 0..20)) {
        let bytes = emit(&records);
        prop_assert_eq!(bytes.len(), records.iter().map(Record::wire_len).sum::<usize>());
        prop_assert!(records.iter().all(|record| record.wire_len() <= MAX_RECORD_LEN));
        prop_assert_eq!(parse(&bytes), Ok(records));
    }

    /// Nothing is ignored but records of unknown types.
    #[test]
    fn what_parses_was_emitted(
        records in proptest::collection::vec(records(), 1..4),
        nonsense in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let mut bytes = emit(&records);
        for (index, byte) in nonsense {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(parsed) = Records::parse(&bytes)
            && parsed.skipped() == 0
        {
            prop_assert_eq!(emit(&parsed.collect::<Vec<_>>()), bytes);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(records) = Records::parse(&bytes) {
            prop_assert!(records.skipped() as usize + records.count() <= bytes.len() / HEADER_LEN);
        }
    }

    #[test]
    fn a_record_cut_anywhere_is_refused(record in records()) {
        let bytes = emit(&[record]);
        for len in 1..bytes.len() {
            let cut = RecordError { field: "record length" };
            prop_assert_eq!(parse(&bytes[..len]), Err(cut));
        }
    }

    /// A later version may add types, and an older reader still finds its own.
    #[test]
    fn unknown_types_are_stepped_over_and_counted(
        known in records(), kind in 12u8.., value in proptest::collection::vec(any::<u8>(), 0..=255),
    ) {
        let unknown = [&[kind, value.len() as u8][..], &value].concat();
        let bytes = [&unknown[..], &emit(std::slice::from_ref(&known)), &unknown].concat();
        prop_assert_eq!(Records::parse(&bytes).map(|records| records.skipped()), Ok(2));
        prop_assert_eq!(parse(&bytes), Ok(vec![known]));
    }
}

const FLOW: FlowKey = FlowKey {
    client_addr: 0x0a00_0001,
    client_port: 0x1234,
    service_port: 7,
};

/// The page that documents the format draws it so.
#[test]
fn the_layout_is_the_documented_one() {
    let flow_and_isn = [10, 0, 0, 1, 0x12, 0x34, 0, 7, 0, 0, 0, 9];
    let open = Open {
        flow: FLOW,
        client_isn: 9,
        active_isn: 0x0102_0304,
        client_window: 0x0506,
        client: Options {
            mss: Some(1460),
            window_scale: Some(7),
            sack_permitted: true,
            timestamp: Some((0x1112_1314, 0)),
        },
        active: Options {
            mss: Some(536),
            ..Options::default()
        },
    };
    let opening = [
        1, 2, 3, 4, 5, 6, // active's number, client's window
        15, 7, 5, 0xb4, 0x11, 0x12, 0x13, 0x14, 0, 0, 0, 0, // client's options
        1, 0, 2, 24, 0, 0, 0, 0, 0, 0, 0, 0, // active's options
    ];
    let (flow, join) = (FLOW, 9);
    let part = Record::Part(Part {
        flow,
        join,
        total: 0x0102,
        offset: 3,
        bytes: [7, 8].into(),
    });
    let values: [(Record, u8, &[u8]); 11] = [
        (
            Record::Offer(Offer {
                flow,
                join,
                client_isn: 2,
                next: 1,
            }),
            6,
            &[0, 0, 0, 2, 0, 0, 0, 1],
        ),
        (part, 7, &[0, 0, 1, 2, 0, 0, 0, 3, 7, 8]),
        (
            Record::Got {
                flow,
                join,
                next: 1,
            },
            8,
            &[0, 0, 0, 1],
        ),
        (Record::Decline { flow, join }, 9, &[]),
        (Record::Lost { flow, join }, 11, &[]),
        (Record::Open(open), 1, &opening),
        (Record::Known(open), 10, &opening),
        (
            Record::Confirm(Confirm {
                flow: FLOW,
                client_isn: 9,
                ack: 1,
                edge: 2,
                sack: [(3, 4), (5, 6)].into_iter().collect(),
            }),
            2,
            &[
                0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0, 6,
            ],
        ),
        (
            Record::Refuse {
                flow: FLOW,
                client_isn: 9,
            },
            3,
            &[],
        ),
        (
            Record::Close {
                flow: FLOW,
                client_isn: 9,
            },
            4,
            &[],
        ),
        (
            Record::Told {
                flow: FLOW,
                client_isn: 9,
                ack: 1,
            },
            5,
            &[0, 0, 0, 1],
        ),
    ];
    for (record, kind, value) in values {
        let header = [kind, (flow_and_isn.len() + value.len()) as u8];
        let expected = [&header[..], &flow_and_isn, value].concat();
        let described = format!("{record:?}");
        assert_eq!(emit(&[record]), expected, "{described}");
    }
}

#[test]
fn a_fifth_sack_block_and_half_a_block_are_refused() {
    let confirm = |blocks: &[u8]| {
        let value = [&[0; FLOW_LEN + 8][..], blocks].concat();
        parse(&[&[kind::CONFIRM, value.len() as u8][..], &value].concat())
    };
    for (len, ok) in [
        (0, true),
        (8, true),
        (32, true),
        (4, false),
        (36, false),
        (40, false),
    ] {
        assert_eq!(confirm(&vec![1; len]).is_ok(), ok, "{len} bytes of blocks");
    }
    let many: Sack = (0..9).map(|i| (i, i + 1)).collect();
    assert_eq!(many.blocks(), [(0, 1), (1, 2), (2, 3), (3, 4)]);
}

#[test]
fn parts_that_do_not_lie_within_a_snapshot_are_refused() {
    let most = MAX_SNAPSHOT as u32;
    for (total, offset, len, ok) in [
        (1, 0, 1, true),
        (most, most - 9, 9, true),
        (1, 0, 0, false),
        (1, 1, 1, false),
        (most + 1, 0, 1, false),
        (most, u32::MAX, 9, false),
    ] {
        let bytes = emit(&[Record::Part(Part {
            flow: FLOW,
            join: 1,
            total,
            offset,
            bytes: vec![1; len].into(),
        })]);
        let field = "part of a snapshot";
        let parsed = parse(&bytes);
        if ok {
            assert!(parsed.is_ok(), "{total} {offset} {len}");
        } else {
            assert_eq!(parsed, Err(RecordError { field }), "{total} {offset} {len}");
        }
    }
}

#[test]
fn options_that_no_agent_writes_are_refused() {
    for (bytes, field) in [
        ([16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "options"),
        ([0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "options"),
        ([4, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], "options"),
        ([7, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1], "options"),
        ([2, 15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "window shift"),
    ] {
        assert_eq!(
            options_from_bytes(bytes),
            Err(RecordError { field }),
            "{bytes:?}"
        );
    }
}
