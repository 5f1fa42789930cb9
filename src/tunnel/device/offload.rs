//! What the kernel leaves to whoever reads a tun, and does for whoever writes to it: checksums, and
//! cutting what was sent at once into packets.
//!
//! Each packet has a header before it that says what is still to be done: `struct virtio_net_hdr`
//! of include/uapi/linux/virtio_net.h, in the byte order of this machine.

/// The length of the header, in bytes.
pub(super) const LENGTH: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum has the sum of the pseudo header only.
const NEEDS_CHECKSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_ECN`, a flag beside the kind.
const ECN: u8 = 0x80;

/// Where TCP and UDP have their checksums.
pub(super) const TCP_CHECKSUM: usize = 16;
pub(super) const UDP_CHECKSUM: usize = 6;

/// What several packets in one are to be cut into: `VIRTIO_NET_HDR_GSO_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Single = 0,
    Tcp4 = 1,
    Tcp6 = 4,
    /// UDP of either family (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    Udp = 5,
}

/// The header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offload {
    pub(super) kind: Kind,
    /// How much payload each packet has but the last, which may have less.
    pub(super) size: usize,
    /// Where the transport header begins and where in it the checksum is, if that is incomplete.
    pub(super) checksum: Option<(usize, usize)>,
}

impl Offload {
    /// Reads a header. `None` if it has something that was not asked for.
    pub(super) fn parse(bytes: [u8; LENGTH]) -> Option<Self> {
        let number = |at: usize| usize::from(u16::from_ne_bytes([bytes[at], bytes[at + 1]]));
        let kind = match bytes[1] & !ECN {
            0 => Kind::Single,
            1 => Kind::Tcp4,
            4 => Kind::Tcp6,
            5 => Kind::Udp,
            _ => return None,
        };
        Some(Self {
            kind,
            size: number(4),
            checksum: (bytes[0] & NEEDS_CHECKSUM != 0).then(|| (number(6), number(8))),
        })
    }

    /// Writes a header; `headers` is the length of those of IP and transport.
    pub(super) fn to_bytes(self, headers: usize) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        // All of these are lengths within a packet of at most 65,535 bytes.
        let mut put = |at: usize, number: usize| {
            bytes[at..at + 2].copy_from_slice(&(number as u16).to_ne_bytes());
        };
        put(2, headers);
        put(4, self.size);
        if let Some((start, offset)) = self.checksum {
            put(6, start);
            put(8, offset);
            bytes[0] = NEEDS_CHECKSUM;
        }
        bytes[1] = self.kind as u8;
        bytes
    }
}

/// The Internet checksum (RFC 1071): the sum of 16-bit words in one's complement, in whatever byte
/// order, so in this machine's.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sum(u64);

impl Sum {
    /// Adds bytes. Only the last ones added may be of odd number.
    pub(super) fn add(mut self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        for word in words {
            self.0 += u64::from(u32::from_ne_bytes(*word));
        }
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        self.0 += u64::from(u32::from_ne_bytes(last));
        self
    }

    /// Adds the pseudo header of TCP and UDP: the addresses of `packet`, an IP packet of either
    /// version, the protocol and the length of transport header and payload.
    pub(super) fn add_pseudo(self, packet: &[u8], protocol: u8, length: usize) -> Self {
        let addresses = if packet[0] >> 4 == 4 {
            &packet[12..20]
        } else {
            &packet[8..40]
        };
        self.add(addresses)
            .add(&[0, protocol])
            .add(&(length as u16).to_be_bytes())
    }

    /// The sum itself.
    pub(super) fn folded(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_ne_bytes()
    }

    /// The checksum.
    pub(super) fn complement(self) -> [u8; 2] {
        let [a, b] = self.folded();
        [!a, !b]
    }
}

/// Completes the checksum of a packet whose transport header begins at `start`.
pub(super) fn complete_checksum(packet: &mut [u8], (start, offset): (usize, usize)) {
    let at = start + offset;
    if at + 2 > packet.len() {
        return;
    }
    // The field has the sum of the pseudo header, so it is simply part of what is added.
    let mut sum = Sum::default().add(&packet[start..]).complement();
    // UDP without a checksum has 0 in its place (RFC 768).
    if sum == [0, 0] && offset == UDP_CHECKSUM {
        sum = [0xff, 0xff];
    }
    packet[at..at + 2].copy_from_slice(&sum);
}

/// Sets the length in an IP header, and its checksum if it has one.
pub(super) fn set_length(packet: &mut [u8], length: usize) {
    if packet[0] >> 4 == 4 {
        let header = usize::from(packet[0] & 0xf) * 4;
        packet[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        packet[10..12].fill(0);
        let sum = Sum::default().add(&packet[..header]).complement();
        packet[10..12].copy_from_slice(&sum);
    } else {
        packet[4..6].copy_from_slice(&((length - 40) as u16).to_be_bytes());
    }
}
