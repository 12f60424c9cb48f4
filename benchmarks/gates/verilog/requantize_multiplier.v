// Requantization of a sum to a byte: min(max(sum * multiplier + offset, 0) >> shift, 255).
module requantize_multiplier #(
    parameter S = 24,  // bits of the sum
    parameter M = 32   // bits of the multiplier
) (
    input signed [S-1:0] sum,
    input signed [M-1:0] multiplier,
    input signed [S+M-1:0] offset,
    input [5:0] shift,
    output [7:0] q
);
  wire signed [S+M:0] scaled = sum * multiplier + offset;
  wire [S+M-1:0] shifted = (scaled < 0 ? 0 : scaled) >> shift;
  assign q = shifted > 255 ? 255 : shifted;
endmodule
