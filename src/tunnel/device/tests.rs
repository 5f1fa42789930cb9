//! What is cut is put together again, and the other way round.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::merge::Run;
use super::offload::{self, Kind, Offload, Sum};
use super::segment;

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const FIN: u8 = 0x01;
const CWR: u8 = 0x80;

/// A packet with right checksums. `sequence` is that of TCP; without one it is UDP.
pub(super) fn packet(
    v6: bool,
    identification: u16,
    sequence: Option<(u32, u8)>,
    payload: &[u8],
) -> Vec<u8> {
    let mut transport = 7000_u16.to_be_bytes().to_vec();
    transport.extend(8000_u16.to_be_bytes());
    let (protocol, checksum) = if let Some((sequence, flags)) = sequence {
        transport.extend(sequence.to_be_bytes());
        transport.extend(77_u32.to_be_bytes());
        // 32 bytes with an option of timestamps.
        transport.extend([0x80, flags, 1, 2, 0, 0, 0, 0]);
        transport.extend([1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
        (6, 16)
    } else {
        transport.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
        transport.extend([0, 0]);
        (17, 6)
    };
    transport.extend(payload);
    let mut packet = if v6 {
        let mut header = vec![0x60, 0, 0, 9, 0, 0, protocol, 64];
        header.extend("2001:db8::1".parse::<Ipv6Addr>().unwrap().octets());
        header.extend("2001:db8::2".parse::<Ipv6Addr>().unwrap().octets());
        header
    } else {
        let mut header = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0];
        header[4..6].copy_from_slice(&identification.to_be_bytes());
        header.extend(Ipv4Addr::new(192, 0, 2, 1).octets());
        header.extend(Ipv4Addr::new(192, 0, 2, 2).octets());
        header
    };
    let start = packet.len();
    packet.extend(&transport);
    let length = packet.len();
    offload::set_length(&mut packet, length);
    let pseudo = Sum::default()
        .add_pseudo(&packet, protocol, transport.len())
        .folded();
    packet[start + checksum..start + checksum + 2].copy_from_slice(&pseudo);
    offload::complete_checksum(&mut packet, (start, checksum));
    packet
}

/// The packets of a stream: of `size` bytes, the last one with what is left.
pub(super) fn stream(
    v6: bool,
    first: u16,
    sequence: u32,
    size: usize,
    data: &[u8],
) -> Vec<Vec<u8>> {
    let count = data.chunks(size).count();
    data.chunks(size)
        .enumerate()
        .map(|(index, part)| {
            let flags = if index + 1 == count { ACK | PSH } else { ACK };
            let sequence = sequence.wrapping_add(u32::try_from(index * size).unwrap());
            let identification = first.wrapping_add(u16::try_from(index).unwrap());
            packet(v6, identification, Some((sequence, flags)), part)
        })
        .collect()
}

fn cut(frame: &[u8], largest: usize) -> Option<Vec<Vec<u8>>> {
    let (header, packet) = frame.split_first_chunk().unwrap();
    let mut packets = Vec::new();
    segment::cut(
        &mut packet.to_vec(),
        Offload::parse(*header)?,
        largest,
        |length, fill| {
            let mut out = vec![0; length];
            fill(&mut out);
            packets.push(out);
        },
    )
    .then_some(packets)
}

/// Runs of all packets, as they are written.
pub(super) fn merge(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut run = Run::new(true);
    let mut written = Vec::new();
    for packet in packets {
        if !run.add(packet) {
            written.extend(run.take().map(<[u8]>::to_vec));
            if !run.begin(packet) {
                written.push([vec![0; offload::LENGTH], packet.clone()].concat());
            }
        }
    }
    written.extend(run.take().map(<[u8]>::to_vec));
    written
}

proptest! {
    #[test]
    fn a_stream_is_the_same_once_it_was_merged_and_cut(
        v6: bool,
        identification: u16,
        sequence: u32,
        size in 1_usize..1460,
        data in proptest::collection::vec(any::<u8>(), 1..20_000),
    ) {
        let packets = stream(v6, identification, sequence, size, &data);
        let written = merge(&packets);
        prop_assert_eq!(written.len(), packets.len().div_ceil(64));
        let again: Vec<_> = written
            .iter()
            .flat_map(|frame| cut(frame, 2000).expect("what was merged can be cut"))
            .collect();
        prop_assert_eq!(again, packets);
    }

    #[test]
    fn datagrams_are_the_same_once_they_were_merged_and_cut(
        v6: bool,
        size in 1_usize..1460,
        identification: u16,
        data in proptest::collection::vec(any::<u8>(), 1..20_000),
    ) {
        let packets: Vec<_> = data
            .chunks(size)
            .zip(0..)
            .map(|(part, index)| packet(v6, identification.wrapping_add(index), None, part))
            .collect();
        let written = merge(&packets);
        prop_assert_eq!(written.len(), packets.len().div_ceil(64));
        let again: Vec<_> = written
            .iter()
            .flat_map(|frame| cut(frame, 100).expect("what was merged can be cut"))
            .collect();
        prop_assert_eq!(again, packets);
    }

    #[test]
    fn packets_that_do_not_fit_the_way_are_made_smaller_and_carry_the_same(
        v6: bool,
        sequence: u32,
        largest in 700_usize..1500,
        data in proptest::collection::vec(any::<u8>(), 2000..10_000),
    ) {
        let whole = &merge(&stream(v6, 0, sequence, 1400, &data))[0];
        let packets = cut(whole, largest).unwrap();
        let headers = if v6 { 72 } else { 52 };
        let mut carried: Vec<u8> = Vec::new();
        for packet in &packets {
            prop_assert!(packet.len() <= largest);
            // A right checksum, or it could not begin a run.
            prop_assert!(Run::new(true).begin(packet));
            let begin = headers - 32 + 4;
            let at = u32::from_be_bytes(packet[begin..begin + 4].try_into().unwrap());
            prop_assert_eq!(at.wrapping_sub(sequence) as usize, carried.len());
            carried.extend(&packet[headers..]);
        }
        prop_assert_eq!(carried, data);
    }

    #[test]
    fn nothing_that_the_kernel_could_say_makes_it_panic(
        header: [u8; offload::LENGTH],
        mut packet in proptest::collection::vec(any::<u8>(), 0..200),
        largest in 0_usize..2000,
    ) {
        let _ = merge(&[packet.clone(), packet.clone()]);
        if let Some(offload) = Offload::parse(header) {
            segment::cut(&mut packet, offload, largest, |length, fill| fill(&mut vec![0; length]));
        }
    }
}

#[test]
fn only_what_continues_a_run_is_merged() {
    let payload = [1; 100];
    let tcp = |sequence, flags| packet(false, 1, Some((sequence, flags)), &payload);
    let first = tcp(1000, ACK);
    let next = tcp(1100, ACK);
    let follows = |first: &[u8], second: &[u8]| {
        let mut run = Run::new(true);
        run.begin(first) && run.add(second)
    };
    assert!(follows(&first, &next));
    assert!(follows(&first, &tcp(1100, ACK | PSH)));
    // A gap, a repetition, a smaller one in between, an end, an urgent one.
    assert!(!follows(&first, &tcp(1101, ACK)));
    assert!(!follows(&first, &first));
    assert!(!follows(&tcp(1000, ACK | PSH), &next));
    for flag in [FIN, CWR, 0x02, 0x04, 0x20, 0x40] {
        assert!(!follows(&first, &tcp(1100, ACK | flag)), "{flag:#x}");
    }
    // Another time to live, type of service, source, port, acknowledgement, window, option.
    for at in [1, 8, 15, 23, 30, 35, 50] {
        let mut other = next.clone();
        other[at] ^= 1;
        let length = other.len();
        offload::set_length(&mut other, length);
        other[36..38].fill(0);
        let sum = Sum::default()
            .add_pseudo(&other, 6, length - 20)
            .add(&other[20..])
            .complement();
        other[36..38].copy_from_slice(&sum);
        assert!(Run::new(true).begin(&other), "{at}");
        assert!(!follows(&first, &other), "{at}");
    }
    // What is damaged stays alone, with its wrong checksum.
    let mut damaged = next.clone();
    *damaged.last_mut().unwrap() ^= 1;
    assert!(!follows(&first, &damaged));
    let written = merge(&[first.clone(), damaged.clone()]);
    assert_eq!(written[1][offload::LENGTH..], damaged);
    // A fragment, and UDP without a checksum.
    let mut fragment = first.clone();
    fragment[6] = 0x20;
    assert!(!Run::new(true).begin(&fragment));
    let mut bare = packet(false, 1, None, &payload);
    assert!(Run::new(true).begin(&bare));
    bare[26..28].fill(0);
    assert!(!Run::new(true).begin(&bare));
}

#[test]
fn datagrams_of_one_size_and_a_smaller_last_one_make_a_run() {
    for v6 in [false, true] {
        let datagram = |size| packet(v6, 1, None, &vec![7; size]);
        let sizes = |sizes: &[usize]| -> usize {
            merge(&sizes.iter().map(|size| datagram(*size)).collect::<Vec<_>>()).len()
        };
        assert_eq!(sizes(&[16; 64]), 1);
        assert_eq!(sizes(&[16; 65]), 2);
        assert_eq!(sizes(&[16, 16, 9]), 1);
        assert_eq!(sizes(&[16, 9, 16]), 2);
        assert_eq!(sizes(&[9, 16, 16]), 2);
        // No more than one packet of IP can have.
        assert_eq!(sizes(&[1472; 64]), 2);
        let whole = &merge(&[datagram(16), datagram(16)])[0];
        let headers = if v6 { 48 } else { 28 };
        let expected = Offload {
            kind: Kind::Udp,
            size: 16,
            checksum: Some((headers - 8, 6)),
        };
        assert_eq!(whole[..offload::LENGTH], expected.to_bytes(headers));
        assert_eq!(whole.len(), offload::LENGTH + headers + 32);
    }
}

#[test]
fn checksums_are_those_of_rfc_1071() {
    // The example in its section 3.
    let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
    assert_eq!(Sum::default().add(&bytes).folded(), [0xdd, 0xf2]);
    assert_eq!(
        Sum::default().add(&bytes).add(&[]).complement(),
        [0x22, 0x0d]
    );
}
