"""Strip shared libraries of any processor: what strip(1) does, with the same bytes on every machine that builds.

binutils strip one processor each and differ in their output from release to release; the archive holds two processors
and must be reproducible. elf(5).
"""

import struct
from typing import NamedTuple

SHF_ALLOC = 2  # the section is part of the memory image; the others serve linkers and debuggers only
SHT_NULL, SHT_STRTAB, SHT_NOBITS = 0, 3, 8
PT_LOAD = 1


class Layout(NamedTuple):
    """Where the two ELF classes keep the fields that are read or changed here."""

    header: struct.Struct  # from e_phoff on: e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, …, e_shstrndx
    header_at: int
    section: struct.Struct  # sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link, sh_info, sh_addralign, …
    segment: struct.Struct
    segment_fields: tuple[int, int]  # the positions of p_offset and p_filesz


LAYOUTS = {
    1: Layout(struct.Struct("<IIIHHHHHH"), 28, struct.Struct("<10I"), struct.Struct("<8I"), (1, 4)),
    2: Layout(struct.Struct("<QQIHHHHHH"), 32, struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IIQQQQQQ"), (2, 5)),
}


def strip(content: bytes) -> bytes:
    """Return a shared library without its symbol table and debugging sections; what is loaded keeps its place.

    Raises ValueError if it is no little-endian ELF file with sections.
    """
    if content[:4] != b"\x7fELF" or content[4] not in LAYOUTS or content[5] != 1:
        raise ValueError("not a little-endian ELF file")
    layout = LAYOUTS[content[4]]
    header = list(layout.header.unpack_from(content, layout.header_at))
    segments_at, sections_at, _, _, _, segment_count, _, section_count, names_index = header
    if not section_count:
        raise ValueError("it has no sections")
    sections = [
        list(layout.section.unpack_from(content, sections_at + number * layout.section.size))
        for number in range(section_count)
    ]
    end = layout.header_at + layout.header.size
    for number in range(segment_count):
        fields = layout.segment.unpack_from(content, segments_at + number * layout.segment.size)
        if fields[0] == PT_LOAD:
            offset, size = (fields[position] for position in layout.segment_fields)
            end = max(end, offset + size)
    image = bytearray(content[:end])
    names_at = sections[names_index][4]
    kept, place, names = [], {}, bytearray(b"\0")
    for number, section in enumerate(sections):
        name_at, kind, flags, _, offset, size = section[:6]
        if kind == SHT_NULL or flags & SHF_ALLOC:
            place[number] = len(kept)
            name = content[names_at + name_at : content.index(b"\0", names_at + name_at)]
            kept.append([names.find(b"\0" + name + b"\0") + 1 if name else 0, *section[1:]])
            if name and not kept[-1][0]:
                kept[-1][0] = len(names)
                names += name + b"\0"
        elif kind != SHT_NOBITS and offset < end:
            image[offset : min(offset + size, end)] = bytes(min(offset + size, end) - offset)  # inside, so it stays
    for section in kept:
        section[6] = place.get(section[6], 0)
        if section[2] & 0x40:  # SHF_INFO_LINK: sh_info is a section too
            section[7] = place.get(section[7], 0)
    name_at = len(names)
    names += b".shstrtab\0"
    kept.append([name_at, SHT_STRTAB, 0, 0, len(image), len(names), 0, 0, 1, 0])
    image += names
    image += bytes(-len(image) % 8)
    header[1], header[7], header[8] = len(image), len(kept), len(kept) - 1
    layout.header.pack_into(image, layout.header_at, *header)
    return bytes(image) + b"".join(layout.section.pack(*section) for section in kept)
