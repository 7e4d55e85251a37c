//! ggml's element types: their numbers, names and block sizes.

/// Number, name, and elements and bytes of one block, which are 0 if the layout is unknown. The first 42 types are
/// llama.cpp's (`ggml.h`), the others those of ik_llama.cpp.
const TYPES: [(u32, &str, usize, usize); 56] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (4, "Q4_2", 0, 0),
    (5, "Q4_3", 0, 0),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (31, "Q4_0_4_4", 0, 0),
    (32, "Q4_0_4_8", 0, 0),
    (33, "Q4_0_8_8", 0, 0),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (36, "IQ4_NL_4_4", 0, 0),
    (37, "IQ4_NL_4_8", 0, 0),
    (38, "IQ4_NL_8_8", 0, 0),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (133, "Q6_0", 0, 0),
    (134, "IQ1_BN", 0, 0),
    (135, "IQ2_BN", 0, 0),
    (137, "IQ2_K", 0, 0),
    (138, "IQ3_K", 0, 0),
    (139, "IQ4_K", 0, 0),
    (140, "IQ5_K", 0, 0),
    (141, "IQ6_K", 0, 0),
    (144, "IQ4_KS", 0, 0),
    (145, "IQ2_KS", 0, 0),
    (146, "IQ4_KSS", 0, 0),
    (152, "IQ5_KS", 0, 0),
    (156, "IQ3_KS", 0, 0),
    (157, "IQ2_KL", 0, 0),
];

/// The largest number of a type of llama.cpp.
const LLAMA_CPP: u32 = 41;

fn found(ggml_type: u32) -> Option<&'static (u32, &'static str, usize, usize)> {
    TYPES.iter().find(|(number, ..)| *number == ggml_type)
}

/// Elements and bytes of one block of a ggml type, or `None` if they are not known.
pub fn ggml_block(ggml_type: u32) -> Option<(usize, usize)> {
    let (_, _, elements, bytes) = found(ggml_type)?;
    (*elements > 0).then_some((*elements, *bytes))
}

/// Whether the type is in the table.
pub(crate) fn ggml_type_is_named(ggml_type: u32) -> bool {
    found(ggml_type).is_some()
}

/// Returns the name of the type, such as `IQ4_NL`, or a text with its number.
pub(crate) fn ggml_type_name(ggml_type: u32) -> String {
    match found(ggml_type) {
        Some((number, name, ..)) if *number <= LLAMA_CPP => (*name).to_owned(),
        Some((_, name, ..)) => format!("{name} of ik_llama.cpp"),
        None => format!("type {ggml_type}, which this program does not know"),
    }
}

/// How to make a file that can be read from one with any type that llama.cpp reads.
pub(crate) const REQUANTISE: &str = "`llama-quantize --allow-requantize FILE OUT.gguf F32` of a current llama.cpp keeps its values; or take \
the model in Q8_0, F16 or as its original directory";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_in_order_and_named_once() {
        assert!(TYPES.windows(2).all(|pair| pair[0].0 < pair[1].0));
        let named = |name: &str| TYPES.iter().filter(|(_, found, ..)| *found == name).count();
        assert!(TYPES.iter().all(|(_, name, ..)| named(name) == 1));
        assert_eq!(ggml_type_name(40), "NVFP4");
        assert_eq!(ggml_type_name(139), "IQ4_K of ik_llama.cpp");
        assert_eq!(
            ggml_type_name(999),
            "type 999, which this program does not know"
        );
        assert_eq!(
            (ggml_block(14), ggml_block(31), ggml_block(999)),
            (Some((256, 210)), None, None)
        );
    }
}
