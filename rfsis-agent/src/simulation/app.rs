//! What runs on the hosts: servers, and clients that check every byte they get.

use super::*;

/// A connection's server on a stack.
pub(crate) struct Server {
    pub(crate) handle: SocketHandle,
    pub(crate) handler: Box<dyn StreamHandler>,
    pub(crate) input: Vec<u8>,
    pub(crate) done: bool,
    /// Bytes of the client that the handler has taken, and all that it wrote.
    pub(crate) taken: u64,
    pub(crate) wrote: Vec<u8>,
    /// Port of the client whose bytes these must be, and the first one's place in its stream.
    pub(crate) expects: Option<(u16, u64)>,
}

impl Server {
    pub(crate) fn new(handle: SocketHandle, handler: Box<dyn StreamHandler>) -> Self {
        Self {
            handle,
            handler,
            input: vec![],
            done: false,
            taken: 0,
            wrote: vec![],
            expects: None,
        }
    }

    /// What came in behind `old` bytes of input is what the client sent.
    fn check(&self, old: usize) {
        let Some((port, base)) = self.expects else {
            return;
        };
        for (at, found) in self.input.iter().enumerate().skip(old) {
            let offset = base + self.taken + at as u64;
            let right = byte(port, offset);
            hold!(
                Exact,
                *found == right,
                "port {port}: the server got {found:#04x} at offset {offset}, not {right:#04x}"
            );
        }
    }

    /// Drives the handler as far as it goes.
    pub(crate) fn run(&mut self, host: &mut Host) {
        let socket = host.socket(self.handle);
        if !socket.may_send() || self.done {
            let _ = socket.recv(|data| (data.len(), ()));
            return;
        }
        loop {
            if self.input.len() < 16 * 1024 && socket.can_recv() {
                let input = &mut self.input;
                let old = input.len();
                let _ = socket.recv(|data| {
                    input.extend_from_slice(data);
                    (data.len(), ())
                });
                self.check(old);
            }
            let eof = !socket.may_recv() && socket.recv_queue() == 0;
            let (handler, input, wrote) = (&mut self.handler, &self.input, &mut self.wrote);
            let progress = socket
                .send(|room| {
                    let progress = handler.advance(input, eof, room);
                    wrote.extend_from_slice(&room[..progress.produced]);
                    (progress.produced, progress)
                })
                .unwrap_or_default();
            self.input.drain(..progress.consumed);
            self.taken += progress.consumed as u64;
            if progress.finished {
                socket.close();
                self.done = true;
                return;
            }
            if progress.consumed == 0 && progress.produced == 0 {
                return;
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// FIN behind the last byte of the upload; then everything until the server's FIN.
    HalfClose,
    /// FIN once everything that is wanted has come.
    Close,
    /// RST once everything that is wanted has come.
    Abort,
    /// FIN after the server's FIN and not before this time.
    AfterServer { not_before: Nanos },
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) service: u16,
    pub(crate) upload: u64,
    pub(crate) want: u64,
    pub(crate) ending: Ending,
    /// Reads this much at once, this often; nothing before `reads_from`.
    pub(crate) read: (usize, Nanos),
    pub(crate) reads_from: Nanos,
    /// Writes this much at once, this often.
    pub(crate) write: (usize, Nanos),
    /// Writes when all that was sent has been echoed.
    pub(crate) turns: bool,
}

impl Plan {
    pub(crate) fn echo(bytes: u64) -> Self {
        Self {
            service: ECHO,
            upload: bytes,
            want: bytes,
            ending: Ending::Close,
            read: (usize::MAX, 0),
            reads_from: 0,
            write: (usize::MAX, 0),
            turns: false,
        }
    }

    pub(crate) fn chargen(bytes: u64) -> Self {
        Self {
            service: CHARGEN,
            upload: 0,
            ending: Ending::Abort,
            ..Self::echo(bytes)
        }
    }

    pub(crate) fn discard(bytes: u64) -> Self {
        Self {
            service: DISCARD,
            want: 0,
            ending: Ending::HalfClose,
            ..Self::echo(bytes)
        }
    }

    pub(crate) fn daytime(not_before: Nanos) -> Self {
        Self {
            service: DAYTIME,
            upload: 0,
            want: 22,
            ending: Ending::AfterServer { not_before },
            ..Self::echo(0)
        }
    }

    pub(crate) fn half_close(self) -> Self {
        Self {
            ending: Ending::HalfClose,
            ..self
        }
    }

    pub(crate) fn slow(self, chunk: usize, every: Nanos) -> Self {
        Self {
            read: (chunk, every),
            ..self
        }
    }

    pub(crate) fn typed(self, chunk: usize, every: Nanos) -> Self {
        Self {
            write: (chunk, every),
            ..self
        }
    }
}

/// Byte `at` of what the client behind `port` sends.
pub(crate) fn byte(port: u16, at: u64) -> u8 {
    let x = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(port) << 17);
    (x ^ (x >> 29)) as u8
}

#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) port: u16,
    pub(crate) plan: Plan,
    pub(crate) handle: SocketHandle,
    pub(crate) sent: u64,
    pub(crate) got: u64,
    pub(crate) text: Vec<u8>,
    pub(crate) next_read: Nanos,
    pub(crate) next_write: Nanos,
    pub(crate) ended: bool,
    pub(crate) reset: bool,
    pub(crate) eof: bool,
    pub(crate) peer_closed: bool,
}

impl Conn {
    /// A connection that has just been opened.
    pub(crate) fn new(port: u16, plan: Plan, handle: SocketHandle) -> Self {
        Self {
            port,
            plan,
            handle,
            sent: 0,
            got: 0,
            text: vec![],
            next_read: 0,
            next_write: 0,
            ended: false,
            reset: false,
            eof: false,
            peer_closed: false,
        }
    }

    pub(crate) fn flow(&self) -> FlowKey {
        flow_key(CLIENT, self.port, self.plan.service)
    }

    pub(crate) fn run(&mut self, host: &mut Host, now: Nanos) {
        let socket = host.socket(self.handle);
        let may_write = !self.plan.turns || self.got >= self.sent;
        if now >= self.next_write && self.sent < self.plan.upload && may_write && socket.can_send()
        {
            let left = self.plan.upload - self.sent;
            let limit = (self.plan.write.0 as u64).min(left) as usize;
            let (port, from) = (self.port, self.sent);
            let count = socket
                .send(|room| {
                    let count = room.len().min(limit);
                    for (at, slot) in room[..count].iter_mut().enumerate() {
                        *slot = byte(port, from + at as u64);
                    }
                    (count, count)
                })
                .unwrap();
            self.sent += count as u64;
            self.next_write = now + self.plan.write.1;
        }
        if now >= self.next_read.max(self.plan.reads_from) && socket.can_recv() {
            let mut limit = self.plan.read.0;
            while limit > 0 && socket.can_recv() {
                let mut data = vec![0; limit.min(65_536)];
                let count = socket.recv_slice(&mut data).unwrap();
                data.truncate(count);
                limit -= count;
                self.check(&data);
            }
            self.next_read = now + self.plan.read.1;
        }
        self.peer_closed |= matches!(
            socket.state(),
            State::CloseWait | State::Closing | State::TimeWait | State::LastAck
        );
        if self.peer_closed && !self.eof && socket.recv_queue() == 0 {
            self.eof = true;
            hold!(
                Exact,
                self.got >= self.plan.want && self.sent == self.plan.upload,
                "port {}: the server's FIN came after {} of {} bytes",
                self.port,
                self.got,
                self.plan.want
            );
        }
        let uploaded = self.sent == self.plan.upload;
        let satisfied = uploaded && self.got >= self.plan.want;
        match self.plan.ending {
            _ if self.ended || socket.state() == State::SynSent => {}
            Ending::HalfClose if uploaded => {
                socket.close();
                self.ended = true;
            }
            Ending::Close if satisfied => {
                socket.close();
                self.ended = true;
            }
            Ending::Abort if satisfied => {
                socket.abort();
                self.ended = true;
            }
            Ending::AfterServer { not_before } if self.eof && now >= not_before => {
                socket.close();
                self.ended = true;
            }
            _ => {}
        }
        let cut_off = !self.peer_closed && self.plan.ending != Ending::Abort;
        if socket.state() == State::Closed && (!self.ended || cut_off) {
            self.reset = true;
        }
    }

    pub(crate) fn check(&mut self, data: &[u8]) {
        let mut expected = vec![0; data.len()];
        match self.plan.service {
            ECHO => {
                for (at, slot) in expected.iter_mut().enumerate() {
                    *slot = byte(self.port, self.got + at as u64);
                }
            }
            CHARGEN => chargen_fill(self.got, &mut expected),
            DAYTIME => {
                self.text.extend_from_slice(data);
                expected.copy_from_slice(data);
            }
            service => broken(
                Invariant::Exact,
                format!("service {service} sent {} bytes", data.len()),
            ),
        }
        if let Some(wrong) = (0..data.len()).find(|&i| data[i] != expected[i]) {
            let (port, at) = (self.port, self.got + wrong as u64);
            broken(
                Invariant::Exact,
                format!("port {port}: a wrong byte at offset {at}"),
            );
        }
        self.got += data.len() as u64;
    }

    pub(crate) fn wakes_at(&self, now: Nanos) -> Nanos {
        let mut at = Nanos::MAX;
        for time in [self.next_read, self.next_write, self.plan.reads_from] {
            if time > now {
                at = at.min(time);
            }
        }
        if let Ending::AfterServer { not_before } = self.plan.ending
            && not_before > now
        {
            at = at.min(not_before);
        }
        at
    }
}
