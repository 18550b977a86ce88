//! What answers a service's bytes.
//!
//! A [`StreamHandler`] is written once and driven twice: on the active over a kernel socket, on the
//! standby over a shadow. Both must write the same bytes at the same stream offsets, so a handler
//! is a function of the client's bytes alone: not of how they were cut into segments, not of when
//! they came, not of how much room there was. A handler that cannot promise this says so in
//! [`HandlerKind::output`].

/// What the output of a handler depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// On the client's bytes alone: a shadow may compute it.
    Replicated,
    /// On something that two nodes do not share (a clock, a random number). A shadow does not run
    /// such a handler; it keeps what it saw the active send. At takeover a flow whose output was
    /// complete, or had not begun, goes on; any other is reset rather than continued with wrong bytes.
    Observed,
}

/// What one call of [`StreamHandler::advance`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes taken from the front of the input.
    pub consumed: usize,
    /// Bytes written to the front of the room.
    pub produced: usize,
    /// Nothing more will ever be written: the output may be closed after what was produced.
    pub finished: bool,
}

/// Answers one TCP connection.
pub trait StreamHandler: Send {
    /// Takes what it can of `input`, writes what it can to `room`. `eof` says that the client sends
    /// nothing behind `input`. Called again whenever there is new input, new room or end of input;
    /// no progress means "nothing to do until then". Call until nothing was consumed or produced.
    fn advance(&mut self, input: &[u8], eof: bool, room: &mut [u8]) -> Progress;

    /// All that the handler knows, for [`HandlerKind::restore`]: what that makes goes on as this one would.
    fn snapshot(&self) -> Vec<u8>;
}

/// A snapshot that no handler of this kind has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("impossible state of a {} handler: are both nodes configured alike?", kind.as_str())]
pub struct RestoreError {
    /// Of which it was to be.
    pub kind: HandlerKind,
}

/// Writes what another copy of the handler had written before, then goes on in its place.
pub struct Resumed {
    /// Already written, and not by `rest`, from `at` on.
    written: Vec<u8>,
    at: usize,
    /// What comes behind it; `None` if nothing does.
    rest: Option<Box<dyn StreamHandler>>,
}

impl Resumed {
    /// `written` goes before whatever `rest` writes; without `rest` it is the end of the output.
    pub fn new(written: Vec<u8>, rest: Option<Box<dyn StreamHandler>>) -> Self {
        Self {
            written,
            at: 0,
            rest,
        }
    }
}

impl std::fmt::Debug for Resumed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (bytes, goes_on) = (self.written.len() - self.at, self.rest.is_some());
        write!(f, "Resumed({bytes} bytes, goes on: {goes_on})")
    }
}

impl StreamHandler for Resumed {
    fn advance(&mut self, input: &[u8], eof: bool, room: &mut [u8]) -> Progress {
        let waiting = &self.written[self.at..];
        if waiting.is_empty()
            && let Some(rest) = &mut self.rest
        {
            return rest.advance(input, eof, room);
        }
        let count = waiting.len().min(room.len());
        room[..count].copy_from_slice(&waiting[..count]);
        self.at += count;
        let through = self.at == self.written.len();
        if through {
            self.written = Vec::new();
            self.at = 0;
        }
        Progress {
            consumed: 0,
            produced: count,
            finished: through && self.rest.is_none(),
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        let waiting = &self.written[self.at..];
        let Some(rest) = &self.rest else {
            return [&[state::LAST], waiting].concat();
        };
        let rest = rest.snapshot();
        if waiting.is_empty() {
            return rest;
        }
        let len = (waiting.len() as u32).to_be_bytes();
        [&[state::RESUMED], &len[..], waiting, &rest].concat()
    }
}

/// First byte of a snapshot: of what.
mod state {
    /// A handler itself; its own state follows.
    pub const PLAIN: u8 = 0;
    /// [`Resumed`](super::Resumed): length of what is still to be written, 4 bytes, that, and the snapshot
    /// of the rest.
    pub const RESUMED: u8 = 1;
    /// `Resumed` without a rest: what is still to be written.
    pub const LAST: u8 = 2;
}

/// The built-in handlers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HandlerKind {
    /// RFC 862: sends back what it gets.
    Echo,
    /// RFC 863: swallows what it gets.
    Discard,
    /// RFC 864: sends a rotating pattern until the client closes.
    Chargen,
    /// RFC 867: sends date and time, closes.
    Daytime,
}

impl HandlerKind {
    /// All built-in handlers.
    pub const ALL: [HandlerKind; 4] = [
        HandlerKind::Echo,
        HandlerKind::Discard,
        HandlerKind::Chargen,
        HandlerKind::Daytime,
    ];

    /// The word used in the config.
    pub const fn as_str(self) -> &'static str {
        match self {
            HandlerKind::Echo => "echo",
            HandlerKind::Discard => "discard",
            HandlerKind::Chargen => "chargen",
            HandlerKind::Daytime => "daytime",
        }
    }

    /// What its output depends on.
    pub const fn output(self) -> Output {
        match self {
            HandlerKind::Echo | HandlerKind::Discard | HandlerKind::Chargen => Output::Replicated,
            HandlerKind::Daytime => Output::Observed,
        }
    }

    /// A handler for a new TCP connection.
    pub fn stream(self) -> Box<dyn StreamHandler> {
        match self {
            HandlerKind::Echo => Box::new(Echo),
            HandlerKind::Discard => Box::new(Discard),
            HandlerKind::Chargen => Box::new(Chargen { position: 0 }),
            HandlerKind::Daytime => Box::new(Daytime::new(crate::wall::now())),
        }
    }

    /// A handler that goes on where the one stopped that made this snapshot.
    ///
    /// # Errors
    /// [`RestoreError`] if none of this kind has made it.
    pub fn restore(self, snapshot: &[u8]) -> Result<Box<dyn StreamHandler>, RestoreError> {
        let impossible = RestoreError { kind: self };
        let mut written = Vec::new();
        let mut left = snapshot;
        let rest = loop {
            let (&what, state) = left.split_first().ok_or(impossible)?;
            match what {
                // Perhaps resumed while it was still being resumed: a loop, because depth is the peer's choice.
                state::RESUMED => {
                    let (len, state) = state.split_first_chunk().ok_or(impossible)?;
                    let len = u32::from_be_bytes(*len) as usize;
                    let (more, state) = state.split_at_checked(len).ok_or(impossible)?;
                    written.extend_from_slice(more);
                    left = state;
                }
                state::PLAIN => break Some(self.restore_plain(state).ok_or(impossible)?),
                state::LAST => {
                    written.extend_from_slice(state);
                    break None;
                }
                _ => return Err(impossible),
            }
        };
        Ok(match rest {
            Some(rest) if written.is_empty() => rest,
            rest => Box::new(Resumed::new(written, rest)),
        })
    }

    fn restore_plain(self, state: &[u8]) -> Option<Box<dyn StreamHandler>> {
        Some(match self {
            HandlerKind::Echo => Box::new(state.is_empty().then_some(Echo)?),
            HandlerKind::Discard => Box::new(state.is_empty().then_some(Discard)?),
            HandlerKind::Chargen => Box::new(Chargen {
                position: u64::from_be_bytes(state.try_into().ok()?),
            }),
            HandlerKind::Daytime => {
                let (&written, text) = state.split_first()?;
                let written = usize::from(written);
                Box::new((written <= text.len()).then(|| Daytime {
                    text: text.to_vec(),
                    written,
                })?)
            }
        })
    }

    /// The answer to a UDP datagram, if there is one.
    pub fn datagram(self, input: &[u8]) -> Option<Vec<u8>> {
        match self {
            HandlerKind::Echo => Some(input.to_vec()),
            HandlerKind::Discard => None,
            // RFC 864 asks for 0 to 512 octets at random; one line keeps the answer small, so that
            // a forged source address gains an attacker little.
            HandlerKind::Chargen => {
                let mut line = vec![0; CHARGEN_LINE];
                chargen_fill(0, &mut line);
                Some(line)
            }
            HandlerKind::Daytime => Some(daytime(crate::wall::now()).into_bytes()),
        }
    }
}

struct Echo;

impl StreamHandler for Echo {
    fn advance(&mut self, input: &[u8], eof: bool, room: &mut [u8]) -> Progress {
        let count = input.len().min(room.len());
        room[..count].copy_from_slice(&input[..count]);
        Progress {
            consumed: count,
            produced: count,
            finished: eof && count == input.len(),
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        vec![state::PLAIN]
    }
}

struct Discard;

impl StreamHandler for Discard {
    fn advance(&mut self, input: &[u8], eof: bool, _room: &mut [u8]) -> Progress {
        Progress {
            consumed: input.len(),
            produced: 0,
            finished: eof,
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        vec![state::PLAIN]
    }
}

/// 95 printable characters, 72 a line, each line begins one character later (RFC 864 section 3).
const CHARGEN_FIRST: u8 = b' ';
const CHARGEN_CHARS: usize = 95;
const CHARGEN_TEXT: usize = 72;
const CHARGEN_LINE: usize = CHARGEN_TEXT + 2;

/// Never finishes by itself: where it would stop at the client's half-close would depend on timing.
struct Chargen {
    position: u64,
}

impl StreamHandler for Chargen {
    fn advance(&mut self, input: &[u8], _eof: bool, room: &mut [u8]) -> Progress {
        chargen_fill(self.position, room);
        self.position = self.position.wrapping_add(room.len() as u64);
        Progress {
            consumed: input.len(),
            produced: room.len(),
            finished: false,
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        [&[state::PLAIN], &self.position.to_be_bytes()[..]].concat()
    }
}

/// The pattern until it repeats: as many lines as there are characters.
static CHARGEN: [u8; CHARGEN_LINE * CHARGEN_CHARS] = {
    let mut pattern = [0; CHARGEN_LINE * CHARGEN_CHARS];
    let mut at = 0;
    while at < pattern.len() {
        let (line, column) = (at / CHARGEN_LINE, at % CHARGEN_LINE);
        pattern[at] = match column {
            CHARGEN_TEXT => b'\r',
            73 => b'\n',
            _ => CHARGEN_FIRST + ((line + column) % CHARGEN_CHARS) as u8,
        };
        at += 1;
    }
    pattern
};

/// Writes the RFC 864 pattern from stream offset `position` on.
pub fn chargen_fill(position: u64, mut room: &mut [u8]) {
    let mut at = (position % CHARGEN.len() as u64) as usize;
    while !room.is_empty() {
        let count = room.len().min(CHARGEN.len() - at);
        let (now, rest) = room.split_at_mut(count);
        now.copy_from_slice(&CHARGEN[at..at + count]);
        (room, at) = (rest, 0);
    }
}

/// The time is that of the connection, so that a retry writes the same bytes.
struct Daytime {
    text: Vec<u8>,
    written: usize,
}

impl Daytime {
    fn new(now: std::time::SystemTime) -> Self {
        Self {
            text: daytime(now).into_bytes(),
            written: 0,
        }
    }
}

impl StreamHandler for Daytime {
    fn advance(&mut self, input: &[u8], _eof: bool, room: &mut [u8]) -> Progress {
        let rest = &self.text[self.written..];
        let count = rest.len().min(room.len());
        room[..count].copy_from_slice(&rest[..count]);
        self.written += count;
        Progress {
            consumed: input.len(),
            produced: count,
            finished: self.written == self.text.len(),
        }
    }

    fn snapshot(&self) -> Vec<u8> {
        // 22 bytes of text.
        [&[state::PLAIN, self.written as u8], &self.text[..]].concat()
    }
}

/// RFC 867 leaves the form open; RFC 3339 in UTC is read by everything.
fn daytime(now: std::time::SystemTime) -> String {
    format!("{}\r\n", humantime::format_rfc3339_seconds(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a handler with input and room cut by `cuts`.
    fn run(kind: HandlerKind, input: &[u8], cuts: &[usize], limit: usize) -> Vec<u8> {
        let mut handler = kind.stream();
        let mut output = Vec::new();
        let mut rest = input;
        for &cut in cuts.iter().cycle() {
            let mut room = vec![0; cut.min(limit - output.len())];
            let offered = &rest[..cut.min(rest.len())];
            let progress = handler.advance(offered, offered.len() == rest.len(), &mut room);
            output.extend_from_slice(&room[..progress.produced]);
            rest = &rest[progress.consumed..];
            if progress.finished || output.len() == limit {
                return output;
            }
        }
        output
    }

    proptest::proptest! {
        #[test]
        fn replicated_output_does_not_depend_on_segmentation(
            input in proptest::collection::vec(proptest::num::u8::ANY, 0..600),
            cuts in proptest::collection::vec(1usize..90, 1..8),
        ) {
            for kind in HandlerKind::ALL.into_iter().filter(|k| k.output() == Output::Replicated) {
                proptest::prop_assert_eq!(
                    run(kind, &input, &cuts, 1000),
                    run(kind, &input, &[1000], 1000)
                );
            }
        }
    }

    /// Offers the same input and room to both, and returns what they wrote, which must be the same.
    fn both(
        one: &mut dyn StreamHandler,
        other: &mut dyn StreamHandler,
        input: &[u8],
        eof: bool,
        room: usize,
    ) -> (Progress, Vec<u8>) {
        let (mut ours, mut theirs) = (vec![0; room], vec![0; room]);
        let progress = one.advance(input, eof, &mut ours);
        assert_eq!(other.advance(input, eof, &mut theirs), progress);
        assert_eq!(ours[..progress.produced], theirs[..progress.produced]);
        ours.truncate(progress.produced);
        (progress, ours)
    }

    proptest::proptest! {
        #[test]
        fn a_restored_handler_goes_on_alike_wherever_its_snapshot_was_taken(
            input in proptest::collection::vec(proptest::num::u8::ANY, 0..600),
            cuts in proptest::collection::vec(1usize..90, 1..8),
            turns in 0usize..20,
            backlog in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
        ) {
            for kind in HandlerKind::ALL {
                let fresh: [Box<dyn StreamHandler>; 3] = [
                    kind.stream(),
                    Box::new(Resumed::new(backlog.clone(), Some(kind.stream()))),
                    Box::new(Resumed::new(backlog.clone(), None)),
                ];
                for mut handler in fresh {
                    let mut rest = &input[..];
                    for (turn, &cut) in cuts.iter().cycle().take(turns + 20).enumerate() {
                        let offered = &rest[..cut.min(rest.len())];
                        let eof = offered.len() == rest.len();
                        let mut copy = kind.restore(&handler.snapshot()).unwrap();
                        let (progress, _) = both(&mut *handler, &mut *copy, offered, eof, cut);
                        if turn == turns {
                            // From here on the copy alone.
                            handler = copy;
                        }
                        rest = &rest[progress.consumed..];
                        if progress.finished {
                            break;
                        }
                    }
                }
            }
        }

        #[test]
        fn a_snapshot_that_no_handler_made_is_refused_without_panic(
            snapshot in proptest::collection::vec(0u8..4, 0..40),
        ) {
            for kind in HandlerKind::ALL {
                if let Ok(handler) = kind.restore(&snapshot) {
                    // What is accepted says the same again.
                    let again = handler.snapshot();
                    proptest::prop_assert_eq!(kind.restore(&again).unwrap().snapshot(), again);
                }
            }
        }
    }

    #[test]
    fn snapshots_of_the_wrong_length_or_kind_are_refused() {
        for (kind, snapshot) in [
            (HandlerKind::Echo, &[][..]),
            (HandlerKind::Echo, &[state::PLAIN, 0]),
            (HandlerKind::Discard, &[9]),
            (HandlerKind::Chargen, &[state::PLAIN]),
            (HandlerKind::Chargen, &[state::PLAIN, 0, 0, 0, 0, 0, 0, 0]),
            (HandlerKind::Daytime, &[state::PLAIN, 2, 0]),
            (HandlerKind::Echo, &[state::RESUMED, 0, 0, 0, 2, 0]),
            (HandlerKind::Echo, &[state::RESUMED, 0, 0, 0, 0]),
        ] {
            let refused = kind.restore(snapshot).err();
            assert_eq!(refused, Some(RestoreError { kind }), "{snapshot:?}");
        }
    }

    #[test]
    fn what_was_resumed_again_and_again_is_restored_without_depth() {
        let mut snapshot = [state::RESUMED, 0, 0, 0, 0].repeat(100_000);
        snapshot.push(state::PLAIN);
        let handler = HandlerKind::Echo.restore(&snapshot).unwrap();
        assert_eq!(handler.snapshot(), [state::PLAIN]);
    }

    #[test]
    fn chargen_prints_the_pattern_of_rfc_864() {
        let mut two_lines = [0; 2 * CHARGEN_LINE];
        chargen_fill(0, &mut two_lines);
        let text = std::str::from_utf8(&two_lines).unwrap();
        let lines: Vec<&str> = text.split("\r\n").collect();
        assert!(lines[0].starts_with(" !\"#$%&'()*+") && lines[0].len() == 72);
        assert!(lines[1].starts_with("!\"#$%&'()*+,") && lines[1].len() == 72);
    }

    #[test]
    fn daytime_is_the_only_handler_that_is_not_replicated() {
        for kind in HandlerKind::ALL {
            assert_eq!(
                kind.output() == Output::Observed,
                kind == HandlerKind::Daytime
            );
        }
    }
}
