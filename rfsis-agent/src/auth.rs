//! Who wrote a message: HMAC-SHA256 (RFC 2104) with the cluster key, cut to 16 bytes.

use hmac::{Hmac, Mac};
use rfsis_common::heartbeat::MAC_LEN;
use sha2::{Digest, Sha256};

/// The cluster key, already absorbed: cloning it for each message saves half of the hashing.
#[derive(Clone)]
pub struct ClusterKey(Hmac<Sha256>);

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterKey").finish_non_exhaustive()
    }
}

impl ClusterKey {
    /// From a key of any length; 32 bytes or more are secure.
    pub fn new(key: &[u8]) -> Self {
        // RFC 2104 section 2 takes a key of any length, and so does `Hmac`.
        match Hmac::new_from_slice(key) {
            Ok(keyed) => Self(keyed),
            Err(_) => unreachable!("HMAC takes keys of any length"),
        }
    }

    /// A key of its own for each purpose, so that a message of one never passes as one of another.
    pub fn derive(&self, purpose: &str) -> Self {
        Self::new(&self.absorb(purpose.as_bytes()).finalize().into_bytes())
    }

    /// The MAC of a message.
    pub fn tag(&self, message: &[u8]) -> [u8; MAC_LEN] {
        let mut tag = [0; MAC_LEN];
        tag.copy_from_slice(&self.absorb(message).finalize().into_bytes()[..MAC_LEN]);
        tag
    }

    /// The message in `signed`, which is a message with its MAC behind it; `None` if the MAC is not the
    /// message's. Takes the same time wherever they differ.
    pub fn authentic<'a>(&self, signed: &'a [u8]) -> Option<&'a [u8]> {
        let (message, tag) = signed.split_last_chunk::<MAC_LEN>()?;
        let verified = self.absorb(message).verify_truncated_left(tag);
        verified.is_ok().then_some(message)
    }

    fn absorb(&self, message: &[u8]) -> Hmac<Sha256> {
        self.0.clone().chain_update(message)
    }
}

/// What messages name their cluster by: the first 8 bytes of SHA-256(name).
pub fn cluster_id(cluster: &str) -> [u8; 8] {
    let digest: [u8; 32] = Sha256::digest(cluster.as_bytes()).into();
    let [a, b, c, d, e, f, g, h, ..] = digest;
    [a, b, c, d, e, f, g, h]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231 section 4.3.
    #[test]
    fn the_tag_is_that_of_hmac_sha256() {
        let tag = ClusterKey::new(b"Jefe").tag(b"what do ya want for nothing?");
        assert_eq!(
            tag,
            0x5bdc_c146_bf60_754e_6a04_2426_0895_75c7_u128.to_be_bytes()
        );
    }

    #[test]
    fn a_derived_key_knows_neither_its_parent_nor_its_siblings() {
        let parent = ClusterKey::new(b"key");
        let (a, b) = (parent.derive("a"), parent.derive("b"));
        let sign = |key: &ClusterKey| [&b"message"[..], &key.tag(b"message")].concat();
        assert_eq!(a.authentic(&sign(&a)), Some(&b"message"[..]));
        for other in [&parent, &b] {
            assert_eq!(a.authentic(&sign(other)), None);
            assert_eq!(other.authentic(&sign(&a)), None);
        }
    }
}
