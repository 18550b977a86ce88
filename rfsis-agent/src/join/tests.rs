use super::*;
use crate::sync::Offer;

fn offer(flow: FlowKey, join: u32) -> Option<Record> {
    Some(Record::Offer(Offer {
        flow,
        join,
        client_isn: 0,
        next: 7,
    }))
}

/// Polls; the number of the only one that is offered.
fn the_offer(joins: &mut Joins, now: Nanos, records: &mut Vec<Record>) -> u32 {
    joins.poll(now, offer, records);
    let [Record::Offer(Offer { join, .. })] = records[..] else {
        panic!("{records:?}");
    };
    join
}

fn flow(port: usize) -> FlowKey {
    FlowKey {
        client_addr: 1,
        client_port: port as u16,
        service_port: 7,
    }
}

/// A standby that puts snapshots together, and what is between.
#[derive(Default)]
struct Lab {
    joins: Joins,
    now: Nanos,
    records: Vec<Record>,
    got: HashMap<FlowKey, (u32, Vec<u8>)>,
    /// Records that come through are those for which this says so.
    lossy: Option<Box<dyn FnMut() -> bool>>,
    most_bytes: usize,
    most_flows: usize,
}

fn snapshot_of(flow: FlowKey, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8) ^ flow.client_port as u8)
        .collect()
}

impl Lab {
    /// One round trip, with snapshots of `len` bytes; then waits for what is due.
    fn round(&mut self, len: usize) {
        let (now, mut records) = (self.now, std::mem::take(&mut self.records));
        self.joins.poll(now, offer, &mut records);
        self.most_bytes = self.most_bytes.max(self.joins.bytes_under_way);
        self.most_flows = self.most_flows.max(self.joins.flows_under_way);
        for record in records {
            if self.lossy.as_mut().is_some_and(|comes| !comes()) {
                continue;
            }
            let (flow, join) = match record {
                Record::Offer(Offer { flow, join, .. }) => {
                    if self.got.get(&flow).is_none_or(|(known, _)| *known != join) {
                        self.got.insert(flow, (join, vec![]));
                    }
                    (flow, join)
                }
                Record::Part(part) => {
                    let (known, bytes) = self.got.get_mut(&part.flow).unwrap();
                    if *known == part.join && part.offset as usize == bytes.len() {
                        bytes.extend(&part.bytes);
                        assert!(bytes.len() <= part.total as usize);
                    }
                    (part.flow, part.join)
                }
                other => panic!("{other:?} from an active"),
            };
            let next = self.got[&flow].1.len() as u32;
            if self.lossy.as_mut().is_some_and(|comes| !comes()) {
                continue;
            }
            if self.joins.process_got(flow, join, next, now) {
                let bytes = Some(snapshot_of(flow, len));
                self.joins.process_snapshot(flow, join, bytes, now);
            }
        }
        self.now = (now + MS / 4).max(self.joins.next_wakeup().min(now + SECOND));
    }

    fn run(&mut self, len: usize) -> usize {
        let mut rounds = 0;
        while self.joins.waiting() > 0 {
            self.round(len);
            rounds += 1;
            assert!(rounds < 100_000, "it does not end: {:?}", self.joins);
        }
        rounds
    }

    fn results(&mut self) -> Vec<JoinResult> {
        let ended = self.joins.take_ended();
        ended.into_iter().map(|ended| ended.result).collect()
    }
}

#[test]
fn all_are_handed_over_within_the_bounds() {
    for (flows, len) in [(1, 1), (3, MAX_SNAPSHOT), (2_000, 100), (100, 3_000)] {
        let mut lab = Lab::default();
        for port in 0..flows {
            lab.joins.want(flow(port), 0);
            lab.joins.want(flow(port), 0);
        }
        lab.run(len);
        assert_eq!(lab.results(), vec![JoinResult::Joined; flows]);
        for (flow, (_, bytes)) in &lab.got {
            assert_eq!(*bytes, snapshot_of(*flow, len));
        }
        assert!(lab.most_flows <= FLOWS_AT_ONCE);
        assert!(lab.most_bytes < BYTES_AT_ONCE + MAX_PART_LEN);
        let least = (flows / OFFERS_A_TICK) as Nanos * TICK;
        assert!(lab.now >= least, "{flows} flows in {} ns", lab.now);
        let state = &lab.joins;
        assert_eq!((state.flows_under_way, state.bytes_under_way), (0, 0));
        assert!(state.timers.is_empty() && state.joins.is_empty());
    }
}

#[test]
fn what_is_lost_is_said_again() {
    for seed in 0..20_u64 {
        let mut state = seed;
        let mut lab = Lab {
            lossy: Some(Box::new(move || {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                (state >> 33) % 10 >= 3
            })),
            ..Lab::default()
        };
        for port in 0..50 {
            lab.joins.want(flow(port), 0);
        }
        lab.run(2_000);
        assert_eq!(lab.results(), vec![JoinResult::Joined; 50]);
        let state = &lab.joins;
        assert_eq!((state.flows_under_way, state.bytes_under_way), (0, 0));
    }
}

#[test]
fn a_standby_that_is_silent_is_left_in_peace_in_the_end() {
    let mut lab = Lab {
        lossy: Some(Box::new(|| false)),
        ..Lab::default()
    };
    lab.joins.want(flow(1), 0);
    lab.run(1);
    assert_eq!(lab.results(), [JoinResult::Failed]);
    assert!(lab.joins.concerns(&flow(1)), "and is not wanted again");
    lab.joins.want(flow(1), lab.now);
    assert_eq!(lab.joins.waiting(), 0);
    // Another standby is another chance.
    lab.joins.clear();
    lab.joins.want(flow(1), lab.now);
    assert_eq!(lab.joins.waiting(), 1);
}

#[test]
fn a_connection_without_a_snapshot_is_tried_again_and_given_up_in_the_end() {
    let mut joins = Joins::default();
    let (mut now, mut offers) = (0, 0);
    joins.want(flow(1), now);
    while joins.waiting() > 0 {
        let mut records = vec![];
        joins.poll(now, offer, &mut records);
        for record in records {
            if let Record::Offer(Offer { flow, join, .. }) = record {
                offers += 1;
                assert!(joins.process_got(flow, join, 0, now));
                assert!(!joins.process_got(flow, join, 0, now), "asked once");
                joins.process_snapshot(flow, join, None, now);
            }
        }
        now = joins.next_wakeup();
    }
    assert_eq!(offers, ATTEMPTS);
    let [ended] = joins.take_ended()[..] else {
        panic!("one has ended");
    };
    assert_eq!(ended.result, JoinResult::Failed);
    assert!(ended.took >= (2 + 4 + 8 + 16) * PAUSE, "{ended:?}");
}

#[test]
fn what_the_standby_has_lost_is_offered_again_without_waiting_for_its_silence() {
    let mut joins = Joins::default();
    let mut records = vec![];
    joins.want(flow(1), 0);
    let join = the_offer(&mut joins, 0, &mut records);
    assert!(joins.process_got(flow(1), join, 0, 0));
    joins.process_snapshot(flow(1), join, Some(vec![1; 500]), 0);
    joins.poll(0, offer, &mut records);
    assert!(!joins.process_lost(flow(1), join + 1, 0), "of another");
    assert!(joins.process_lost(flow(1), join, 0));
    assert_eq!((joins.flows_under_way, joins.bytes_under_way), (0, 0));
    let again = joins.next_wakeup();
    assert!(again < PATIENCE / 2, "{again} ns");
    records.clear();
    assert_ne!(the_offer(&mut joins, again, &mut records), join);
}

#[test]
fn what_answers_another_join_or_goes_back_or_too_far_is_ignored() {
    let mut joins = Joins::default();
    let mut records = vec![];
    joins.want(flow(1), 0);
    let join = the_offer(&mut joins, 0, &mut records);
    assert!(!joins.process_got(flow(1), join + 1, 0, 0));
    assert!(!joins.process_got(flow(2), join, 0, 0));
    joins.process_decline(flow(1), join + 1, 0);
    assert!(!joins.process_got(flow(1), join, 5, 0), "nothing was sent");
    assert!(joins.process_got(flow(1), join, 0, 0));
    joins.process_snapshot(flow(1), join + 1, Some(vec![1; 500]), 0);
    assert!(joins.awaits(&flow(1), join));
    joins.process_snapshot(flow(1), join, Some(vec![1; 500]), 0);
    joins.poll(0, |_, _| None, &mut records);
    joins.process_got(flow(1), join, 300, 0);
    joins.process_got(flow(1), join, 200, 0);
    joins.process_got(flow(1), join, 501, 0);
    assert_eq!(joins.bytes_under_way, 200);
    joins.process_decline(flow(1), join, 0);
    assert_eq!(joins.bytes_under_way, 0);
    assert_eq!(joins.take_ended()[0].result, JoinResult::Declined);
}
