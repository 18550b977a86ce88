//! Runs of a program on a frame that is nobody's (`BPF_PROG_TEST_RUN`, net/bpf/test_run.c), with all its
//! effects on maps and rings: what the tests ask the kernel for.

use aya::programs::{TestRun as _, TestRunOptions};
use rfsis_common::maps::names;

use super::{BpfError, Programs};

/// A program of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// XDP, ingress.
    Xdp,
    /// TC, ingress: catches frames, and copies what it passes.
    Ingress,
    /// TC, ingress behind XDP: copies.
    Mirror,
    /// TC, egress.
    Gate,
}

/// What a TC program finds beside the bytes of a frame.
#[derive(Clone, Copy, Debug, Default)]
pub struct SkbContext {
    /// `skb->mark`.
    pub mark: u32,
    /// Interface on which the frame is, which also says for whom it is by its hardware address; 0 for the
    /// loopback interface.
    pub ifindex: u32,
}

impl SkbContext {
    /// `struct __sk_buff` up to `ifindex`, include/uapi/linux/bpf.h. What is missing is taken as 0.
    fn bytes(self) -> [u8; 44] {
        let mut skb = [0; 44];
        skb[8..12].copy_from_slice(&self.mark.to_ne_bytes());
        skb[40..].copy_from_slice(&self.ifindex.to_ne_bytes());
        skb
    }
}

impl Programs {
    /// Runs a program on a frame; gives its `xdp_action` or `TC_ACT_` code, and the frame as it left it.
    /// The XDP program sees no `context`.
    ///
    /// # Errors
    /// EINVAL for frames that the kernel does not take for a test run: below 14 bytes, and for TC IPv4
    /// without a whole header and more than a page.
    pub fn test_run(
        &mut self,
        program: Program,
        frame: &[u8],
        context: SkbContext,
    ) -> Result<(i32, Vec<u8>), BpfError> {
        self.test_runs(program, frame, context, 1)
    }

    /// The same so many times in one go: each run gets the frame as the one before left it.
    ///
    /// # Errors
    /// As [`Programs::test_run`].
    pub fn test_runs(
        &mut self,
        program: Program,
        frame: &[u8],
        context: SkbContext,
        times: u32,
    ) -> Result<(i32, Vec<u8>), BpfError> {
        let skb = context.bytes();
        let mut output = vec![0; frame.len()];
        let mut options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut output),
            repeat: times,
            ..TestRunOptions::default()
        };
        let name = match program {
            Program::Xdp => names::XDP,
            Program::Ingress => names::INGRESS,
            Program::Mirror => names::MIRROR_PROGRAM,
            Program::Gate => names::GATE,
        };
        let result = if program == Program::Xdp {
            self.xdp_program()?.test_run(options)
        } else {
            options.ctx_in = Some(&skb);
            self.tc_program(name)?.test_run(options)
        };
        match result {
            Ok(result) => Ok((result.return_value.cast_signed(), output)),
            Err(error) => Err(BpfError::new(format!("test run of {name}"), &error)),
        }
    }
}
