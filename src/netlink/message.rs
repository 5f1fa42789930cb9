//! How netlink messages are laid out: a header, a family's own header, attributes in attributes.

/// Everything in a netlink message starts at a multiple of this (`NLMSG_ALIGNTO`, `NLA_ALIGNTO`
/// of `linux/netlink.h`).
const ALIGN: usize = 4;
/// The size of `struct nlmsghdr`.
const MESSAGE_HEADER: usize = 16;
/// The size of `struct nlattr`.
const ATTRIBUTE_HEADER: usize = 4;
/// `NLA_F_NESTED`: the attribute holds attributes.
const NESTED: u16 = 1 << 15;
/// `NLA_TYPE_MASK`: what is left of a type without its two flag bits.
const TYPE_MASK: u16 = 0x3fff;

const fn aligned(length: usize) -> usize {
    length.div_ceil(ALIGN) * ALIGN
}

/// The body of a message that is being written: a fixed part, then attributes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Body(Vec<u8>);

impl Body {
    /// A body that begins with a family's fixed part.
    pub fn new(fixed: &[u8]) -> Body {
        let mut body = Body(Vec::with_capacity(256));
        body.0.extend_from_slice(fixed);
        body.pad();
        body
    }

    /// A body that begins with `struct nfgenmsg`, as everything in the netfilter family does
    /// (`linux/netfilter/nfnetlink.h`). `resource` is in host byte order here.
    pub fn netfilter(family: u8, resource: u16) -> Body {
        let resource = resource.to_be_bytes();
        Body::new(&[family, 0, resource[0], resource[1]])
    }

    /// Appends one attribute with a plain value.
    ///
    /// A value too long for an attribute's 16-bit length is cut there, which no caller comes near:
    /// what livemig writes are numbers, addresses and names.
    pub fn leaf(&mut self, kind: u16, value: &[u8]) -> &mut Body {
        let value = &value[..value.len().min(usize::from(u16::MAX) - ATTRIBUTE_HEADER)];
        let length = (ATTRIBUTE_HEADER + value.len()) as u16;
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.pad();
        self
    }

    /// Appends a string, with the zero byte that the kernel expects behind it.
    pub fn text(&mut self, kind: u16, value: &str) -> &mut Body {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.leaf(kind, &bytes)
    }

    /// Appends one attribute that holds the attributes which `fill` writes.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Body)) -> &mut Body {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; ATTRIBUTE_HEADER]);
        fill(self);
        let length = ((self.0.len() - start).min(usize::from(u16::MAX))) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
        self
    }

    /// Appends what another body holds.
    pub fn append(&mut self, other: &Body) {
        self.0.extend_from_slice(&other.0);
    }

    /// What was written.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    fn pad(&mut self) {
        self.0.resize(aligned(self.0.len()), 0);
    }
}

impl From<Body> for Vec<u8> {
    fn from(body: Body) -> Vec<u8> {
        body.0
    }
}

/// One attribute of a message that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attribute<'a> {
    /// Its type, without the two flag bits.
    pub kind: u16,
    /// Its value.
    pub value: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// The attributes inside.
    pub fn nested(&self) -> Attributes<'a> {
        Attributes::new(self.value)
    }

    /// The value as an 8-bit number.
    pub fn u8(&self) -> Option<u8> {
        self.value.first().copied()
    }

    /// The value as a 16-bit number in network byte order.
    pub fn be16(&self) -> Option<u16> {
        Some(u16::from_be_bytes(self.value.get(..2)?.try_into().ok()?))
    }

    /// The value as a 32-bit number in network byte order.
    pub fn be32(&self) -> Option<u32> {
        Some(u32::from_be_bytes(self.value.get(..4)?.try_into().ok()?))
    }

    /// The value as a 64-bit number in network byte order.
    pub fn be64(&self) -> Option<u64> {
        Some(u64::from_be_bytes(self.value.get(..8)?.try_into().ok()?))
    }

    /// The value as text, up to its first zero byte.
    pub fn text(&self) -> String {
        let end = self.value.iter().position(|&b| b == 0);
        String::from_utf8_lossy(&self.value[..end.unwrap_or(self.value.len())]).into_owned()
    }
}

/// Walks over the attributes in a piece of a message, without copying.
///
/// It stops at the first attribute whose length does not fit, so it never reads beyond the message
/// and always ends.
#[derive(Debug, Clone)]
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// The attributes in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Attributes<'a> {
        Attributes(bytes)
    }

    /// The attributes behind a fixed part of `fixed` bytes: none if the message is shorter.
    pub fn after(bytes: &'a [u8], fixed: usize) -> Attributes<'a> {
        Attributes(bytes.get(aligned(fixed)..).unwrap_or_default())
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let length = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?);
        let value = self.0.get(ATTRIBUTE_HEADER..length)?;
        self.0 = self.0.get(aligned(length)..).unwrap_or_default();
        Some(Attribute {
            kind: kind & TYPE_MASK,
            value,
        })
    }
}

/// One message that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`: that of the request it answers, zero for events and packets.
    pub sequence: u32,
    /// Everything behind the header.
    pub body: &'a [u8],
}

/// Walks over the messages that one `recv(2)` brought.
///
/// The last one may lack its padding: packets of a queue do.
#[derive(Debug, Clone)]
pub struct Messages<'a>(&'a [u8]);

impl<'a> Messages<'a> {
    /// The messages in what was received.
    pub fn new(bytes: &'a [u8]) -> Messages<'a> {
        Messages(bytes)
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let header: &[u8; MESSAGE_HEADER] = self.0.get(..MESSAGE_HEADER)?.try_into().ok()?;
        let word = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let length = usize::try_from(word(0)).ok()?;
        let body = self.0.get(MESSAGE_HEADER..length)?;
        self.0 = self.0.get(aligned(length)..).unwrap_or_default();
        Some(Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: word(8),
            body,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attributes_come_back_as_written() {
        let mut body = Body::netfilter(2, 7);
        body.leaf(1, &[1, 2, 3])
            .nest(2, |inner| {
                inner.leaf(3, &42u32.to_be_bytes()).text(4, "name");
            })
            .leaf(5, &[]);
        let read: Vec<_> = Attributes::after(body.as_bytes(), 4).collect();
        assert_eq!(read.len(), 3);
        assert_eq!(read[0].value, [1, 2, 3]);
        let inner: Vec<_> = read[1].nested().collect();
        assert_eq!(read[1].kind, 2);
        assert_eq!(inner[0].be32(), Some(42));
        assert_eq!(inner[1].text(), "name");
        assert!(read[2].value.is_empty());
    }

    proptest! {
        #[test]
        fn garbage_is_walked_to_its_end_and_no_further(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let limit = bytes.len();
            prop_assert!(Attributes::new(&bytes).count() <= limit);
            prop_assert!(Messages::new(&bytes).count() <= limit);
        }

        #[test]
        fn leaves_of_any_length_stay_apart(values in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20)) {
            let mut body = Body::default();
            for (kind, value) in values.iter().enumerate() {
                body.leaf(kind as u16, value);
            }
            let read: Vec<Vec<u8>> = Attributes::new(body.as_bytes()).map(|a| a.value.to_vec()).collect();
            prop_assert_eq!(read, values);
        }
    }
}
